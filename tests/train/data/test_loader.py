"""Loader: batches, exact resume, any number of ranks and workers, evaluation passes, feature cache."""

import io
import logging
import os
import pickle
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from common.errors import ConfigError
from data_prep.parts import builtin as parts
from data_prep.store.errors import DataError
from data_prep.store.manifest import build_manifest, read_receipt, write_manifest
from data_prep.store.sample import Sample
from data_prep.store.split import Split
from data_prep.store.writer import ShardWriter, write_split
from model.batch import IGNORE
from train.config import RunConfig
from train.data import (
    DataConfig,
    EvalLoader,
    PixelPreprocessor,
    SourceConfig,
    TrainLoader,
    ensure_feature_cache,
    loader_errors,
    make_text,
    open_train_split,
)
from train.data.features import split_keys
from train.evaluate import training_questions

PIXELS = PixelPreprocessor("resize", 8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def png(seed, size=(12, 9)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def made(number, images=1, dialogues=3):
    turns = [
        [
            {"role": "user", "content": f"question {number} {d}?"},
            {"role": "assistant", "content": f"answer {number} {d}"},
        ]
        for d in range(dialogues)
    ]
    return Sample(f"s{number}", [png(100 * number + i) for i in range(images)], turns, "made")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_split(root / "a", [made(n, images=n % 3, dialogues=1 + n % 4) for n in range(40)])
    write_split(root / "b", [made(100 + n) for n in range(10)])
    write_split(root / "text", [made(200 + n, images=0) for n in range(4)])
    return root


@pytest.fixture(autouse=True)
def _torch_hears_of_dead_workers(monkeypatch):
    """Once a test, as once in a rank: `loader_errors` ends it at the first death."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(parts.ensure("smollm2-135m-instruct", fetch=False))


def config(root, **changes):
    sources = [SourceConfig("a"), SourceConfig("b", 0.5)]
    defaults = {"root": str(root), "train": sources, "batch_size": 12, "dialogues_per_sample": 2, "template": "qa"}
    return DataConfig(**{**defaults, **changes})


def rows(batches):
    """Everything of micro-batches that does not depend on padding, sample by sample."""
    found = []
    for batch in batches:
        for sample in range(batch.n_samples):
            texts = [
                (
                    batch.input_ids[r][batch.attention_mask[r] == 1].tolist(),
                    batch.labels[r][batch.attention_mask[r] == 1].tolist(),
                )
                for r in (batch.row_to_sample == sample).nonzero().flatten().tolist()
            ]
            images = batch.images[(batch.image_to_sample == sample) & (batch.image_weight > 0)]
            found.append((texts, images.numpy().tobytes()))
    return found


def test_a_batch_holds_what_the_samples_hold(root, tokenizer):
    (batch,) = next(TrainLoader(config(root), tokenizer, PIXELS))
    assert batch.n_samples == 12 and batch.row_to_sample.tolist() == sorted(batch.row_to_sample.tolist())
    assert batch.images.shape == (len(batch.image_to_sample), 3, 8, 8) and batch.images.dtype == torch.float32
    lengths = batch.attention_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert batch.labels[row, length:].eq(IGNORE).all()
        # The end token, whose id is also that of padding, is a target; padding is not.
        assert batch.labels[row, length - 1] == tokenizer.eos_token_id == batch.input_ids[row, -1]
    assert lengths.max() == batch.input_ids.shape[1]
    (padded,) = next(TrainLoader(config(root, pad_to_multiple=16), tokenizer, PIXELS))
    assert padded.input_ids.shape[1] % 16 == 0 and rows([padded]) == rows([batch])


def test_batch_without_images_has_a_weightless_dummy(root, tokenizer):
    text = config(root, train=[SourceConfig("text")], batch_size=2)
    (batch,) = next(TrainLoader(text, tokenizer, PIXELS))
    assert batch.images.shape == (1, 3, 8, 8) and not batch.images.any()
    assert batch.image_weight.tolist() == [0] and not batch.has_image


def test_same_global_sequence_on_any_number_of_ranks(root, tokenizer):
    loader = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    whole = [rows(next(loader)) for _ in range(6)]  # beyond one epoch of 45 samples
    for world, accumulation in ((2, 1), (4, 3), (1, 4), (3, 2)):
        ranks = [TrainLoader(config(root), tokenizer, PIXELS, 5, rank, world, accumulation) for rank in range(world)]
        for step in range(6):
            parts = [next(rank) for rank in ranks]
            assert all(len(part) == accumulation for part in parts)
            assert [row for part in parts for row in rows(part)] == whole[step]


def test_resume_anywhere_and_on_other_ranks(root, tokenizer):
    loader = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    whole = [rows(next(loader)) for _ in range(8)]
    for stop in range(7):
        before = TrainLoader(config(root), tokenizer, PIXELS, 5, 0, 2)
        for _ in range(stop):
            next(before)
        after = [TrainLoader(config(root), tokenizer, PIXELS, 5, rank, 4) for rank in range(4)]
        for rank in after:
            rank.load(before.state())
        assert after[0].state() == before.state()
        assert [row for rank in after for row in rows(next(rank))] == whole[stop]


def test_worker_processes_change_nothing(root, tokenizer):
    plain = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    workers = TrainLoader(config(root, num_workers=2, prefetch=1), tokenizer, PIXELS, seed=5)
    workers.load({"step": 2})
    whole = [rows(next(plain)) for _ in range(5)]
    assert [rows(next(workers)) for _ in range(3)] == whole[2:]


@pytest.mark.parametrize("group_by", ["none", "length", "length_modality"])
def test_a_run_that_changes_its_ranks_sees_the_same_sequence(root, tokenizer, group_by):
    """2 ranks, then 1, then 4, each time from the state alone, across epochs."""
    settings = config(root, batch_size=8, group_by=group_by, group_window=3, num_workers=0)
    whole = TrainLoader(settings, tokenizer, PIXELS, seed=5)
    expected = [rows(next(whole)) for _ in range(9)]
    state, seen = None, []
    for world, accumulation in ((2, 2), (1, 4), (4, 1)):
        ranks = [TrainLoader(settings, tokenizer, PIXELS, 5, rank, world, accumulation) for rank in range(world)]
        for rank in ranks if state else ():
            rank.load(state)
        seen += [[row for rank in ranks for row in rows(next(rank))] for _ in range(3)]
        assert len({str(rank.state()) for rank in ranks}) == 1
        state = ranks[0].state()
        assert all(type(value) is int for value in state.values())
    for step, (got, wanted) in enumerate(zip(seen, expected, strict=True)):
        assert sorted(got) == sorted(wanted)
        assert group_by != "none" or got == wanted, step


def test_grouping_shortens_rows(root, tokenizer):
    long = [made(n, images=n % 2) for n in range(64)]
    for sample in long:
        sample.conversations[0][1]["content"] = "word " * (1 + int(sample.id[1:]) ** 2 % 61)
    write_split(root / "long", long)

    def padding(group_by):
        changes = {"train": [SourceConfig("long")], "batch_size": 8, "dialogues_per_sample": None}
        loader = TrainLoader(config(root, group_by=group_by, **changes), tokenizer, PIXELS, accumulation=2)
        masks = [batch.attention_mask for _ in range(8) for batch in next(loader)]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    assert padding("length") < 0.8 * padding("none")


@pytest.mark.parametrize(("image_tokens", "budget"), [(0, 45), (9, 120)])
def test_tokens_bound_micro_batches_and_change_nothing_else(root, tokenizer, image_tokens, budget):
    """Every rank has as many micro-batches, none above the budget, and a step holds what it holds without."""
    plain = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    expected = [rows(next(plain)) for _ in range(4)]

    def tokens(batch):
        images = torch.bincount(batch.image_to_sample[batch.image_weight > 0], minlength=batch.n_samples)
        return int(batch.attention_mask.sum() + image_tokens * images[batch.row_to_sample].sum())

    settings = config(root, tokens_per_micro_batch=budget)
    counts = []
    for world in (1, 2, 4):
        ranks = [TrainLoader(settings, tokenizer, PIXELS, 5, rank, world, 1, image_tokens) for rank in range(world)]
        assert ranks[0].fingerprint == plain.fingerprint
        for step in range(4):
            parts = [next(rank) for rank in ranks]
            assert len({len(part) for part in parts}) == 1
            assert max(tokens(batch) for part in parts for batch in part) <= budget
            empty = ([], b"")
            found = [row for part in parts for batch in part if batch.n_targets for row in rows([batch])]
            assert sorted(row for row in found if row != empty) == sorted(expected[step])
            counts.append((world, len(parts[0])))
    assert len({count for world, count in counts if world == 1}) > 1  # it follows from the tokens
    assert max(count for world, count in counts if world == 4) < min(count for world, count in counts if world == 1)


@pytest.fixture
def damaged(tmp_path):
    """Three shards of 30 samples, the middle one damaged in its last record."""
    for number in range(3):
        with ShardWriter(tmp_path / "set", number, "") as writer:
            for n in range(30):
                writer.add(made(30 * number + n, images=n % 2, dialogues=1))
    receipts = [read_receipt(tmp_path / "set", number) for number in range(3)]
    write_manifest(tmp_path / "set", build_manifest(tmp_path / "set", receipts, "made", "set", {}))
    file = tmp_path / "set" / "shard-00001.arrow"
    content = file.read_bytes()
    at = content.rindex(b"answer 59")
    file.write_bytes(content[:at] + b"\xff\xff" + content[at + 2 :])
    return tmp_path


def test_a_corrupt_shard_stops_the_run_with_its_name(damaged, tokenizer):
    loader = TrainLoader(config(damaged, train=[SourceConfig("set")]), tokenizer, PIXELS)
    with pytest.raises(DataError, match=r"^shard \S+/set/shard-00001.arrow is corrupt \([^\n]*what is sound is kept$"):
        for _ in range(3):
            next(loader)


@pytest.mark.parametrize("damage", ["bytes", "missing"])
def test_a_corrupt_shard_is_left_out_the_same_everywhere(damaged, tokenizer, damage):
    if damage == "missing":
        (damaged / "set" / "shard-00001.arrow").unlink()
    settings = config(
        damaged, train=[SourceConfig("set")], batch_size=10, on_corrupt_shard="drop", group_by="length_modality"
    )
    loader = TrainLoader(settings, tokenizer, PIXELS, seed=2)
    expected = [rows(next(loader)) for _ in range(9)]
    ((file, problem),) = loader.corrupt.items()
    assert file == damaged / "set" / "shard-00001.arrow" and str(file) in str(problem) and problem.samples == 30
    ids = {n for step in expected for texts, _ in step for n in [tokenizer.decode(texts[0][0])]}
    numbers = {int(text.split("question ")[1].split()[0]) for text in ids}
    assert numbers == {*range(30), *range(60, 90)}
    ranks = [TrainLoader(settings, tokenizer, PIXELS, 2, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load({"step": 5})  # resumed: the shard may be met for the first time only now
    for step in range(5, 9):
        assert sorted(row for rank in ranks for row in rows(next(rank))) == sorted(expected[step])


@pytest.mark.parametrize("damage", ["bytes", "missing"])
def test_a_feature_cache_leaves_out_what_the_loader_leaves_out(damaged, tokenizer, caplog, tmp_path, damage):
    if damage == "missing":
        (damaged / "set" / "shard-00001.arrow").unlink()
    settings = config(damaged, train=[SourceConfig("set")], batch_size=10, on_corrupt_shard="drop")

    def cache(split):
        return ensure_feature_cache(
            tmp_path / "cache", [split], PIXELS, lambda x: x.flatten(2)[:, :, :5], "v", "float32"
        )

    with caplog.at_level(logging.WARNING):
        made = cache(open_train_split(settings, "set"))
    told = [record.getMessage() for record in caplog.records]
    assert (
        len(told) == 1 and "shard-00001.arrow" in told[0] and "30 samples are left out of the feature cache" in told[0]
    )
    assert len(made) == 30  # of 45 images
    loader, plain = (TrainLoader(settings, tokenizer, image, seed=2) for image in (made, PIXELS))
    for _ in range(9):
        (batch,), (pixels,) = next(loader), next(plain)
        assert torch.equal(batch.images, pixels.images.flatten(2)[:, :, :5]) or not batch.has_image
    with pytest.raises(DataError, match=r"^shard \S+/shard-00001.arrow"):
        cache(open_train_split(config(damaged), "set"))


@pytest.mark.parametrize("images", ["own", "shuffled"])
def test_evaluation_never_leaves_a_corrupt_shard_out(damaged, tokenizer, images):
    settings = config(damaged, on_corrupt_shard="drop")
    split, text = Split(damaged / "set"), make_text(settings, tokenizer)
    with pytest.raises(DataError, match=r"^shard \S+/shard-00001.arrow is corrupt .*evaluation asks everything$"):
        EvalLoader(split, text, PIXELS, images=images)
    sound = 0
    for seed in range(20):  # a choice that needs nothing of the shard is evaluated
        try:
            sound += len(list(EvalLoader(split, text, PIXELS, limit=1, images=images, seed=seed)))
        except DataError:
            continue
    assert 0 < sound < 20
    run = RunConfig(data=replace(settings, train=[SourceConfig("set")]))
    seen = [int(question.sample[1:]) for question in training_questions(run)]  # those that it was trained on
    assert seen == [*range(30), *range(60, 90)]


def test_workers_killed_and_told_to_stop(root, tokenizer):
    """Stop signals reach workers too on a cluster: they go on. Killed ones end the run, which goes on exactly."""
    plain = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    expected = [rows(next(plain)) for _ in range(6)]
    loader = TrainLoader(config(root, num_workers=1, prefetch=1), tokenizer, PIXELS, seed=5)
    seen = [rows(next(loader))]
    (worker,) = loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    seen += [rows(next(loader)) for _ in range(2)]
    state = loader.state()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="DataLoader worker .*newest checkpoint"):
        for _ in range(3):  # what it had ready is still good
            seen.append(rows(next(loader)))
            state = loader.state()
    again = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    again.load(state)
    while len(seen) < 6:
        seen.append(rows(next(again)))
    assert seen == expected


def test_a_worker_killed_while_nothing_is_loaded_is_named_too(root, tokenizer):
    """torch's signal handler raises in the middle of whatever the process is doing."""
    loader = TrainLoader(config(root, num_workers=1, prefetch=1), tokenizer, PIXELS, seed=5)
    next(loader)
    (worker,) = loader._iterator._workers
    with pytest.raises(DataError, match="DataLoader worker .*Killed.*newest checkpoint"), loader_errors():
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(1000):
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match="^another"), loader_errors():
        raise RuntimeError("another")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_told_once(root, tokenizer, error, monkeypatch):
    """The connection breaks before the signal comes, and the signal then interrupts no clearing up."""
    loader = TrainLoader(config(root, num_workers=1, prefetch=1), tokenizer, PIXELS, seed=5)
    next(loader)

    def get(timeout):
        raise error

    monkeypatch.setattr(loader._iterator._data_queue, "get", get)
    with pytest.raises(DataError, match="DataLoader worker is gone: .*lower data.num_workers"):
        next(loader)
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()


def test_tiles_are_images_of_their_sample(root, tokenizer):
    tiles = PixelPreprocessor("tiles", 8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), max_tiles=2)  # 12 x 9: two, and overview
    (plain,), (batch,) = (next(TrainLoader(config(root), tokenizer, image, seed=1)) for image in (PIXELS, tiles))
    assert batch.image_to_sample.tolist() == plain.image_to_sample.repeat_interleave(3).tolist()
    assert torch.equal(batch.images[::3], plain.images) and batch.image_weight.eq(1).all()
    assert batch.images.shape == (len(batch.image_weight), 3, 8, 8)
    text = config(root, train=[SourceConfig("text")], batch_size=2)
    (blind,) = next(TrainLoader(text, tokenizer, tiles))
    assert blind.images.shape == (1, 3, 8, 8) and not blind.has_image
    split, encoders = Split(root / "a"), make_text(config(root), tokenizer)
    counts = [
        sum(int(step.batch.image_weight.sum()) for step in EvalLoader(split, encoders, image))
        for image in (PIXELS, tiles)
    ]
    assert counts[1] == 3 * counts[0] == 3 * split.manifest.images


def test_an_epoch_shows_everything(root, tokenizer):
    loader = TrainLoader(config(root, batch_size=5, dialogues_per_sample=None), tokenizer, PIXELS)
    assert loader.epoch_size == 45
    seen = [row for _ in range(9) for texts, _ in rows(next(loader)) for row, _ in texts]
    expected = sum(1 + n % 4 for n in range(40)) + 5 * 3
    assert len(seen) == expected == len({tuple(row) for row in seen})


def test_fingerprint_follows_what_decides_the_order(root, tokenizer):
    one = TrainLoader(config(root), tokenizer, PIXELS).fingerprint
    assert one == TrainLoader(config(root, num_workers=1), tokenizer, PIXELS, 0, 1, 2).fingerprint
    assert one == TrainLoader(config(root, group_window=2, on_corrupt_shard="drop"), tokenizer, PIXELS).fingerprint
    for change in (
        {"batch_size": 24},
        {"group_by": "length"},
        {"dialogues_per_sample": 1},
        {"train": [SourceConfig("a")]},
    ):
        assert one != TrainLoader(config(root, **change), tokenizer, PIXELS).fingerprint


def test_bad_data_is_named_also_from_workers(tmp_path, tokenizer):
    bad = made(1)
    bad.images = [png(1)[:60]]
    write_split(tmp_path / "bad", [bad])
    for workers in (0, 1):
        loader = TrainLoader(
            config(tmp_path, train=[SourceConfig("bad")], batch_size=1, num_workers=workers), tokenizer, PIXELS
        )
        with pytest.raises(DataError, match=r"^\S+shard-00000.arrow: sample s1: image (truncated|corrupt)[^\n]*$"):
            next(loader)


def test_too_long_fails_or_is_counted(root, tokenizer):
    with pytest.raises(DataError, match=r"sample s\d+, dialogue 0: \d+ tokens, max_length=9; raise data.max_length or"):
        next(TrainLoader(config(root, max_length=9), tokenizer, PIXELS))
    loader = TrainLoader(config(root, max_length=9, on_too_long="drop"), tokenizer, PIXELS)
    (batch,) = next(loader)
    assert loader.dropped > 0 and batch.n_samples == 12
    assert batch.n_targets == 0 and batch.input_ids.shape == (1, 1)  # nothing left: one padding row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "data.train is empty"),
        ({"train": [SourceConfig("nowhere")]}, "nowhere is no prepared split"),
        ({"train": [SourceConfig("a", 0.0)]}, r"data\.train\[0\]\.weight=0\.0: must be above 0"),
        ({"train": [SourceConfig("a", 1e-6)]}, "each must be above 0"),
        ({"batch_size": 13}, "does not divide among 2 ranks"),
        ({"template": "chatml"}, "data.template=chatml: choose one of plain, .*chat"),
        ({"on_too_long": "cut"}, "on_too_long=cut"),
        ({"dialogues_per_sample": 0}, "dialogues_per_sample=0"),
        ({"group_by": "size"}, "data.group_by=size: choose one of none, length, length_modality"),
        ({"tokens_per_micro_batch": 0}, "data.tokens_per_micro_batch=0"),
        ({"group_window": 0}, "data.group_window=0"),
        ({"on_corrupt_shard": "skip"}, "on_corrupt_shard=skip: choose one of fail, drop"),
    ],
)
def test_bad_configuration(root, tokenizer, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        TrainLoader(config(root, **changes), tokenizer, PIXELS, world_size=2)


def test_evaluation_covers_every_dialogue_once_over_ranks(root, tokenizer):
    split, text = Split(root / "a"), make_text(config(root), tokenizer)
    for world in (1, 3, 8):
        loaders = [EvalLoader(split, text, PIXELS, rows=7, rank=rank, world_size=world) for rank in range(world)]
        assert len({len(loader) for loader in loaders}) == 1
        items = []
        for loader in loaders:
            steps = list(loader)
            assert len(steps) == len(loader)
            for step in steps:
                assert not step.items or len(step.items) == len(step.batch.input_ids)
                assert step.batch.labels.eq(IGNORE).all() and step.batch.attention_mask[:, -1].all()  # left padding
                items += step.items
        assert len(items) == split.manifest.dialogues == len({(i.sample, i.dialogue) for i in items})
        assert all(i.answer == i.question.rstrip("?").replace("question", "answer") for i in items)


def test_evaluation_choices(root, tokenizer):
    split, text = Split(root / "a"), make_text(config(root), tokenizer)
    few = [i for step in EvalLoader(split, text, PIXELS, limit=20, seed=3) for i in step.items]
    assert len(few) == 20 and few == [
        i for s in EvalLoader(split, text, PIXELS, limit=20, seed=3, rows=3) for i in s.items
    ]
    blind = list(EvalLoader(split, text, PIXELS, images="none"))
    assert not any(step.batch.has_image for step in blind)
    own, shuffled = (
        [image for step in EvalLoader(split, text, PIXELS, images=kind) for _, image in rows([step.batch])]
        for kind in ("own", "shuffled")
    )
    for n in range(40):
        assert (own[n] != shuffled[n]) == bool(n % 3)  # with images: another's; text-only stays text-only
    assert sorted(own) == sorted(shuffled)
    asked, swapped, alone = (
        {item.sample: item.shown for step in EvalLoader(split, text, PIXELS, images=kind) for item in step.items}
        for kind in ("own", "shuffled", "none")
    )
    image_of = dict(zip(asked, own, strict=True))
    assert [image_of[shown] for shown in swapped.values() if shown] == [x for n, x in enumerate(shuffled) if n % 3]
    assert all(shown in ("", sample) for sample, shown in asked.items()) and any(asked.values())
    assert not any(alone.values())
    loss = next(iter(EvalLoader(split, text, PIXELS, prompts=False))).batch
    assert loss.n_targets > 0


def test_feature_cache(root, tokenizer, tmp_path):
    splits, calls = [Split(root / "a"), Split(root / "b")], []

    def encode(pixels):
        calls.append(len(pixels))
        return pixels.flatten(2).transpose(1, 2)[:, :5]

    cache = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "float32", batch_size=7)
    assert len(cache) == sum(split.manifest.unique_images for split in splits) and cache.shape == (5, 3)
    for data in (*splits[0][2].images, *splits[1][9].images):
        assert torch.equal(cache(data), encode(PIXELS(data)))
    assert len(pickle.dumps(cache)) < 500 and torch.equal(pickle.loads(pickle.dumps(cache))(data), cache(data))
    calls.clear()
    again = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "float32")
    assert again.folder == cache.folder and not calls
    assert ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v2", "float32").folder != cache.folder
    half = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "bfloat16")
    data = splits[1][0].images[0]
    assert half(data).dtype is torch.bfloat16 and torch.equal(half(data), cache(data).bfloat16())
    with pytest.raises(DataError, match="not in the feature cache"):
        cache(png(12345))
    (batch,) = next(TrainLoader(config(root), tokenizer, half))
    assert batch.images.shape[1:] == (5, 3) and batch.images.dtype is torch.bfloat16


def test_a_feature_cache_takes_over_what_others_hold(root, tmp_path):
    """Of the same encoder, on two ranks, which encode equally often; damaged features are found on the way."""
    a, b, world = Split(root / "a"), Split(root / "b"), 2

    def cache(splits, version="v1", offset=0.0):
        """The cache, how many images were encoded, and how often each rank called the encoder."""
        seen, calls, together = [], [0] * world, threading.Barrier(world)

        def rank(number):
            def encode(pixels):
                calls[number] += 1
                seen.extend(image for image in pixels if image.any())
                return pixels.flatten(2).transpose(1, 2)[:, :5] + offset

            try:
                return ensure_feature_cache(
                    tmp_path, splits, PIXELS, encode, version, "float32", 7, "run", number, world, together.wait
                )
            except (DataError, threading.BrokenBarrierError) as error:
                together.abort()
                return error

        with ThreadPoolExecutor(world) as pool:
            made = list(pool.map(rank, range(world)))
        for failed in [one for one in made if isinstance(one, DataError)]:
            raise failed
        assert calls[0] == calls[1]
        return made[0], len(seen)

    first, count = cache([a])
    assert count == len(first) == len(split_keys(a))
    both, count = cache([a, b], offset=1.0)
    assert count == len(both) - len(first) == len(split_keys(b))
    old, new = a[2].images[0], b[3].images[0]
    plain = PIXELS(new).flatten(2).transpose(1, 2)[:, :5]
    assert torch.equal(both(old), first(old)) and torch.equal(both(new), plain + 1)
    assert cache([b])[1] == 0 and torch.equal(cache([b])[0](new), both(new))
    assert cache([a, b], "v2")[1] == len(both)  # another encoder's are others

    other, _ = cache([a], "v3")
    with (other.folder / "features.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(DataError, match="damaged.*not what was written"):
        cache([a, b], "v3")
    assert cache([a, b], "v3")[1] == len(both)  # without it


def test_two_runs_make_the_feature_cache_at_once(root, tmp_path):
    """The second begins and ends while the first is in the middle; both end with the same whole cache."""
    splits, inner = [Split(root / "a"), Split(root / "b")], []

    def plain(pixels):
        return pixels.flatten(2).transpose(1, 2)[:, :5]

    def interrupted(pixels):
        if len(pixels) == 7 and not inner:
            inner.append(ensure_feature_cache(tmp_path, splits, PIXELS, plain, "v1", "float32", run="second"))
        return plain(pixels)

    first = ensure_feature_cache(tmp_path, splits, PIXELS, interrupted, "v1", "float32", batch_size=7, run="first")
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name] == [inner[0].folder.name]
    image = splits[1][9].images[0]
    assert torch.equal(first(image), plain(PIXELS(image))) and torch.equal(inner[0](image), first(image))


@pytest.mark.parametrize("file", ["features.npy", "keys.npy", "checksums.npy", "meta.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "empty"])
def test_a_damaged_feature_cache_is_named_and_made_anew(root, tmp_path, capsys, file, how):
    splits, whole = [Split(root / "a"), Split(root / "b")], None

    def encode(pixels):
        return pixels.flatten(2).transpose(1, 2)[:, :5]

    def cache():
        return ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "float32")

    images = [image for split in splits for sample in split for image in sample.images]
    whole = cache()
    victim = whole.folder / file
    content = bytearray(victim.read_bytes())
    content[-9] ^= 16
    changed = {"flip": bytes(content), "cut": bytes(content[:-3]), "empty": b""}
    victim.unlink() if how == "gone" else victim.write_bytes(changed[how])
    try:
        for image in images:
            cache()(image)
    except DataError as error:  # found when it is read: features of one image
        assert re.search("feature cache .* is damaged.* made? .*anew|makes the cache anew", str(error))
    again = cache()
    said = capsys.readouterr().err
    assert "warning: the feature cache is damaged and is made anew" in said
    assert all(torch.equal(again(image), encode(PIXELS(image))) for image in images)


def test_features_that_are_not_finite_name_the_sample(root, tmp_path):
    with pytest.raises(DataError, match=r"features of \S+arrow: sample s\d+ are not finite"):
        ensure_feature_cache(tmp_path, [Split(root / "a")], PIXELS, lambda p: p.flatten(2) / 0, "v1", "float32")


def test_shared_memory_too_small_for_the_loader_is_said_before_it_starts(root, tokenizer, tmp_path, monkeypatch):
    loader = TrainLoader(config(root, num_workers=3, prefetch=5), tokenizer, PIXELS)
    loader.check_shared_memory(local_ranks=8)
    monkeypatch.setattr("train.data.loader.shutil.disk_usage", lambda _: SimpleNamespace(free=64 * 2**10))
    (batch,) = loader._steps[0].batches
    need = 2 * 16 * sum(t.nbytes for t in vars(batch).values() if isinstance(t, torch.Tensor)) / 2**20
    message = rf"/dev/shm has 0 MiB free, .* need {need:.0f} MiB: .*num_workers=3 x data.prefetch=5.*--shm-size"
    with pytest.raises(DataError, match=message):
        loader.check_shared_memory(local_ranks=2, folder="/dev/shm")
    TrainLoader(config(root), tokenizer, PIXELS).check_shared_memory(local_ranks=2)  # no loader processes


class Unsendable:
    """A batch that cannot be handed over."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class BrokenSteps(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return Unsendable()


def test_a_batch_that_cannot_be_handed_over_ends_the_wait(root, tokenizer):
    loader = TrainLoader(config(root, num_workers=1), tokenizer, PIXELS)
    loader._steps = BrokenSteps()
    with pytest.raises(DataError, match="DataLoader worker .* exited unexpectedly.*lower data.num_workers"):
        next(loader)
