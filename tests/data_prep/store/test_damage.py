"""Every file of a prepared split, damaged in every way: refused by name, repaired and said, or harmless."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.division import Divided
from data_prep.prepare import Options, Task, prepare
from data_prep.sources.synthetic import Synthetic
from data_prep.store.errors import DataError
from data_prep.store.manifest import map_array
from data_prep.store.split import Split
from tests.data_prep.store.test_store import Numbers

DAMAGE = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": lambda file: file.write_bytes(_flipped(file.read_bytes())),
    "other type": lambda file: file.write_bytes(b'["a list"]\n'),
    "binary": lambda file: file.write_bytes(np.random.default_rng(0).bytes(500)),
    "directory": lambda file: (file.unlink(), file.mkdir()),
}


def _flipped(data):
    changed = bytearray(data)
    changed[len(changed) * 2 // 3] ^= 4
    return bytes(changed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "set"
    prepare(Numbers(2, 3), folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named_or_made_again(whole, tmp_path, damage):
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.is_file()]
    assert len(files) == 1 + 2 * 4 + 2
    samples = list(Split(whole / "train"))
    for number, name in enumerate(files):
        folder = tmp_path / str(number) / "set"
        shutil.copytree(whole, folder)
        DAMAGE[damage](folder / name)
        # Reading: the right samples, or one line that names the split's folder or file.
        try:
            split = Split(folder / "train")
            split.verify()
            assert list(split) == samples
            assert split.index()["images"].tolist() == [1] * 6
        except DataError as error:
            assert str(folder / "train") in str(error)
        # Preparing again: as it was, bit for bit; only a folder in a file's place has to be taken away by hand.
        try:
            result = prepare(Numbers(2, 3), folder)
        except (DataError, OSError) as error:
            assert damage == "directory" and str(folder) in str(error), name
            continue
        assert list(Split(folder / "train")) == samples
        Split(folder / "train").verify()
        for file in files:
            assert (folder / file).read_bytes() == (whole / file).read_bytes(), (name, file)
        told = result.damaged or result.made or name.suffix == ".json"
        assert told, name


def test_a_name_that_leaves_the_folder_is_refused(whole, tmp_path):
    """A manifest that somebody else wrote, its checksum left out or right."""
    shutil.copytree(whole, tmp_path / "set")
    file = tmp_path / "set" / "train" / "manifest.json"
    text = file.read_text()
    without = "\n".join(line for line in text.splitlines() if '"checksum"' not in line)
    without = without.replace('"index": "' + Split(whole / "train").manifest.index + '",', '"index": ""')
    for name in ("../../outside.arrow", "/etc/passwd", "shard-00000.arrow/../x"):
        file.write_text(without.replace("shard-00000.arrow", name, 1))
        with pytest.raises(DataError, match="is no file of a shard"):
            Split(tmp_path / "set" / "train")


def test_other_data_are_not_replaced(tmp_path):
    """Another source, other options, and what a killed preparation left: kept, unless told otherwise."""
    folder = tmp_path / "set"
    prepare(Numbers(2), folder)
    before = Split(folder / "train").fingerprint
    with pytest.raises(DataError, match=r"train was made from something else \(size differ\).*overwrite=true"):
        prepare(Numbers(2, 4), folder)
    with pytest.raises(DataError, match=r"\(options.shrink differ\)"):
        prepare(Numbers(2), folder, Options(shrink=4))
    assert Split(folder / "train").fingerprint == before and not prepare(Numbers(2), folder).made
    assert prepare(Numbers(1, 4), folder, overwrite=True).made == ["train"]
    assert [s.id for s in Split(folder / "train")] == ["s0", "s1", "s2", "s3"]
    assert not list(folder.rglob("shard-00001*"))
    with pytest.raises(KeyboardInterrupt):
        prepare(Numbers(crash=25), tmp_path / "cut")
    with pytest.raises(DataError, match="made from something else .and was not finished."):
        prepare(Numbers(3), tmp_path / "cut")
    assert prepare(Numbers(), tmp_path / "cut").made == ["train"]


def test_division_is_by_image_and_the_same_everywhere(tmp_path):
    source = Divided(Synthetic(300, 25), 0.2, 0.1)
    made = prepare(source, tmp_path / "one").manifests
    sizes = {name: manifest.samples for name, manifest in made.items()}
    assert sum(sizes.values()) == 300 and 35 < sizes["val"] < 85 and 12 < sizes["test"] < 50
    ids = [sample.id for split in sizes for sample in Split(tmp_path / "one" / split)]
    assert len(set(ids)) == 300
    other = prepare(Divided(Synthetic(300, 40), 0.2, 0.1), tmp_path / "other").manifests
    for split in sizes:
        assert {s.id for s in Split(tmp_path / "one" / split)} == {s.id for s in Split(tmp_path / "other" / split)}
    assert {name: manifest.samples for name, manifest in other.items()} == sizes
    with pytest.raises(DataError, match="leave nothing to train on|no sample; make its share larger"):
        prepare(Divided(Synthetic(3, 5), 0.0, 0.001), tmp_path / "small")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 70), unit=st.integers(1, 70), tasks=st.integers(1, 4), order=st.randoms())
def test_any_layout_gives_the_same_samples(tmp_path_factory, size, unit, tasks, order):
    """Any number of samples in shards of any size, made by any tasks in any order."""
    edges = [*range(0, size, unit), size]

    class Layout(Numbers):
        def made_from(self):
            return {"size": size}

        def plan(self):
            return {"train": [[start, end] for start, end in pairwise(edges)]}

        def read(self, split, span):
            return iter(Synthetic(size, words=4).read("train", span))

    folder = tmp_path_factory.mktemp("layout") / "set"
    indices = list(range(tasks))
    order.shuffle(indices)
    if size == 0:
        with pytest.raises(DataError, match="no sample"):
            prepare(Layout(), folder)
        return
    made = [prepare(Layout(), folder, task=Task(index, tasks)).made for index in indices]
    assert sum(made, []) == ["train"]
    split = Split(folder / "train")
    assert [sample.id for sample in split] == [f"synthetic/{n}" for n in range(size)]
    assert split[size - 1] == next(iter(Synthetic(size, words=4).read("train", [size - 1, size])))
    assert len(split.index()) == size and split.index()["images"].sum() == size


def test_any_flipped_bit_of_an_arrays_header_is_no_more_than_a_value_error(tmp_path):
    file = tmp_path / "index.npy"
    np.save(file, np.arange(6))
    sound = file.read_bytes()
    for bit in range(8 * 128):
        changed = bytearray(sound)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            map_array(file)
        except (ValueError, OSError):
            continue
