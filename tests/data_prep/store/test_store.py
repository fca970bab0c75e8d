"""Shards, manifests and the mapped reader; preparation that is killed, split over tasks, or meets bad data."""

import io
import os
import pickle
import signal
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError
from data_prep.prepare import Options, Task, prepare
from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.manifest import MANIFEST
from data_prep.store.sample import INDEX_FILE, Dropped, Sample
from data_prep.store.split import Split
from data_prep.store.writer import write_split


def png(seed, size=(8, 8)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def sample(number, images=1, answer="yes"):
    turns = [{"role": "user", "content": "ok?"}, {"role": "assistant", "content": answer}]
    return Sample(f"s{number}", [png(number * 10 + i) for i in range(images)], [turns] * (1 + number % 3), "made")


@dataclass
class Numbers:
    """A source of `size` samples per unit; those in `bad` cannot be read."""

    count: int = 4
    size: int = 10
    bad: tuple[int, ...] = ()
    crash: int | None = None

    def made_from(self):
        return {"count": self.count, "size": self.size, "bad": self.bad}

    def plan(self):
        return {"train": list(range(self.count))}

    def read(self, split, unit):
        for number in range(unit * self.size, (unit + 1) * self.size):
            if number == self.crash:
                raise KeyboardInterrupt
            yield Dropped(f"s{number}", "image missing", "x.png") if number in self.bad else sample(number)


def test_samples_come_back_exactly(tmp_path):
    samples = [sample(n, images=n % 3) for n in range(150)]  # text-only, one and two images; three record batches
    manifest = write_split(tmp_path / "train", samples)
    split = Split(tmp_path / "train")
    assert list(split) == samples
    assert [split[n] for n in (149, 0, 64, 63)] == [samples[n] for n in (149, 0, 64, 63)]
    assert pickle.loads(pickle.dumps(split))[77] == samples[77]
    assert (manifest.samples, manifest.images, manifest.text_only) == (150, 150, 50)
    assert split.index()["images"].tolist() == [n % 3 for n in range(150)]
    assert split.index()["characters"][2] == 3 * len("ok?yes")
    assert isinstance(split.index(), np.memmap) and len(pickle.dumps(split)) < 3000
    (tmp_path / "train" / INDEX_FILE).unlink()  # as splits were prepared before there was one
    assert np.array_equal(Split(tmp_path / "train").index(), split.index())
    with pytest.raises(IndexError):
        split[150]
    split.verify()


def test_fingerprint_is_of_the_samples(tmp_path):
    samples = [sample(n) for n in range(5)]
    one = write_split(tmp_path / "a" / "train", samples).fingerprint
    assert write_split(tmp_path / "b" / "train", samples).fingerprint == one
    assert write_split(tmp_path / "c" / "train", samples[::-1]).fingerprint != one
    assert write_split(tmp_path / "d" / "train", [*samples[:4], sample(4, answer="no")]).fingerprint != one


def test_readable_by_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_split(tmp_path / "train", [sample(n) for n in range(3)])
    file = str(tmp_path / "train" / "shard-00000.arrow")
    loaded = datasets.load_dataset("arrow", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[2]["id"] == "s2" and loaded[2]["images"] == sample(2).images


def test_more_shards_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.store.split.OPEN_SHARDS", 2)
    prepare(Numbers(5), tmp_path)
    split = Split(tmp_path / "train")
    for position in (3, 45, 21, 33, 3, 10, 49, 3):
        assert split[position].id == f"s{position}" and len(split._opened) <= 2
    assert split.index()["images"].tolist() == [1] * 50


def test_a_shard_is_corrupt_or_not_whichever_sample_is_asked_for(tmp_path):
    """Damage in the last of three record batches shows when the first sample is read."""
    write_split(tmp_path / "train", [sample(n, answer=f"answer {n}") for n in range(150)])
    shard = tmp_path / "train" / "shard-00000.arrow"
    whole = shard.read_bytes()
    at = whole.index(b"answer 149")
    shard.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])  # no UTF-8
    with pytest.raises(CorruptShardError, match="is corrupt"):
        Split(tmp_path / "train")[0]


def test_damage_is_named(tmp_path):
    write_split(tmp_path / "train", [sample(n) for n in range(3)])
    shard = tmp_path / "train" / "shard-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=f"shard {shard} should have {len(whole)} bytes, it has {len(whole) - 100}"):
        Split(tmp_path / "train")
    shard.write_bytes(bytes([whole[1000] ^ 1]).join([whole[:1000], whole[1001:]]))
    with pytest.raises(DataError, match=f"shard {shard}: expected sha256"):
        Split(tmp_path / "train").verify()
    shard.write_bytes(b"\0" * len(whole))
    for position in (0, 2):
        with pytest.raises(CorruptShardError, match=f"shard {shard} is corrupt .*what is sound is kept") as caught:
            Split(tmp_path / "train")[position]
        assert (caught.value.file, caught.value.samples) == (shard, 3)
    shard.unlink()
    with pytest.raises(DataError, match="it is missing"):
        Split(tmp_path / "train")
    late = Split(tmp_path / "train", whole=False)
    with pytest.raises(CorruptShardError, match="it is missing"):
        late[0]
    with pytest.raises(DataError, match="no prepared split"):
        Split(tmp_path)


def test_a_killed_task_redoes_only_its_unfinished_shard(tmp_path):
    folder = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(crash=25), folder)
    finished = {n: (folder / "train" / f"shard-0000{n}.arrow").stat().st_mtime_ns for n in (0, 1)}
    assert not list(folder.rglob("shard-00002*")) and not list(folder.rglob(".shard*"))
    assert not (folder / "train" / MANIFEST).exists()
    (folder / "train" / ".shard-00002.999.tmp").write_bytes(b"left by a killed process")
    result = prepare(Numbers(), folder)
    assert result.made == ["train"]
    assert not list(folder.rglob(".shard*"))
    for number, time in finished.items():
        assert (folder / "train" / f"shard-0000{number}.arrow").stat().st_mtime_ns == time
    assert [s.id for s in Split(folder / "train")] == [f"s{n}" for n in range(40)]


def test_job_array_equals_one_process(tmp_path):
    whole = prepare(Numbers(5), tmp_path / "whole").manifests["train"]
    first = prepare(Numbers(5), tmp_path / "array", task=Task.parse("0/2"))
    assert first.waiting == {"train": 2} and not first.manifests
    second = prepare(Numbers(5), tmp_path / "array", task=Task.parse("1/2"))
    assert second.manifests["train"].fingerprint == whole.fingerprint
    assert second.manifests["train"].shards == whole.shards
    assert not prepare(Numbers(5), tmp_path / "array", task=Task.parse("0/2")).made


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """But by a task of several: another may be writing that file now."""
    prepare(Numbers(5), tmp_path / "set")
    left = [
        tmp_path / "set" / folder / f".{name}.{'0' * 32}" for folder, name in (("train", MANIFEST), (".", "plan.json"))
    ]
    for file in left:
        file.touch()
    prepare(Numbers(5), tmp_path / "set", task=Task(0, 2))
    assert all(file.exists() for file in left)
    prepare(Numbers(5), tmp_path / "set")
    assert not any(file.exists() for file in left)


def test_many_processes_equal_one(tmp_path):
    whole = prepare(Numbers(3), tmp_path / "one").manifests["train"]
    assert prepare(Numbers(3), tmp_path / "two", workers=2).manifests["train"].shards == whole.shards


def test_bad_records_fail_or_are_counted(tmp_path):
    source = Numbers(bad=(7, 21))
    with pytest.raises(DataError, match=r"set/train: sample s7: image missing \(x.png\).*on_error=drop"):
        prepare(source, tmp_path / "set")
    options = Options(on_error="drop", max_drop_fraction=0.05)
    manifest = prepare(source, tmp_path / "set", options).manifests["train"]
    assert manifest.samples == 38 and manifest.dropped == {"image missing": 2}
    assert [example["id"] for example in manifest.dropped_examples] == ["s7", "s21"]
    assert "s7" not in [s.id for s in Split(tmp_path / "set" / "train")]
    with pytest.raises(DataError, match="2 of 40 records are bad .5.00%, accepted are 1.00%.: 2 image missing"):
        prepare(source, tmp_path / "other", Options(on_error="drop"))
    split = tmp_path / "other" / "train"
    assert not (split / MANIFEST).exists()
    before = {file: file.stat().st_mtime_ns for file in split.glob("*.arrow")}
    assert prepare(source, tmp_path / "other", options).made == ["train"]  # accepting more makes nothing anew
    assert before == {file: file.stat().st_mtime_ns for file in split.glob("*.arrow")}
    with pytest.raises(DataError, match="2 of 40 records are bad .5.00%, accepted are 0.00%"):
        prepare(source, tmp_path / "other")


def test_duplicates_are_counted(tmp_path):
    manifest = write_split(tmp_path / "train", [sample(1), sample(1), sample(2)])
    assert (manifest.images, manifest.unique_images) == (3, 2)


def test_index_is_one_mapped_file(tmp_path):
    prepare(Numbers(3), tmp_path / "set")
    split = Split(tmp_path / "set" / "train")
    index = split.index()
    assert isinstance(index, np.memmap)
    (split.folder / INDEX_FILE).unlink()  # as prepared by an earlier version
    assert index.tolist() == split.index().tolist() and len(index) == 30


def test_late_tasks_share_units_out_alike(tmp_path):
    """A split that is complete when the second task starts does not move the units of the next one."""

    class TwoSplits(Numbers):
        def plan(self):
            return {"small": [0], "train": list(range(1, 5))}

    first = prepare(TwoSplits(), tmp_path, task=Task(0, 2))
    assert first.made == ["small"]
    assert prepare(TwoSplits(), tmp_path, task=Task(1, 2)).made == ["train"]


class Fatal(Numbers):
    """Its third unit ends the process that reads it, as the system does when memory is short."""

    def read(self, split, unit):
        if unit == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(split, unit)


def test_a_worker_that_dies_is_one_clear_message(tmp_path):
    with pytest.raises(DataError, match="a worker process died.*finished shards are kept"):
        prepare(Fatal(), tmp_path, workers=2)
    assert prepare(Numbers(), tmp_path).made == ["train"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(on_error="skip"), "options.on_error=skip: choose one of fail, drop"),
        (Options(max_drop_fraction=1.5), "options.max_drop_fraction=1.5: must be at least 0"),
        (Options(shrink=1), "options.shrink=1: at least options.min_side=2"),
        (Options(jpeg_quality=0), "options.jpeg_quality=0: must be at least 1"),
        (Options(max_length=9), "options.max_length=9: is in tokens and needs options.tokenizer"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare(Numbers(), tmp_path, options)
