"""A split of a million samples: its order, resume after a kill, and what it takes of a process's memory."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_scale
from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.sources.synthetic import Synthetic
from data_prep.store.manifest import build_manifest, write_manifest
from data_prep.store.sample import shard_stem
from data_prep.store.split import Split
from data_prep.store.writer import ShardWriter

pytestmark = pytest.mark.slow
SHARDS, PER_SHARD = 100, 10_000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One shard of synthetic pairs under a hundred names: the files of a million samples in seconds."""
    root = tmp_path_factory.mktemp("million")
    folder = root / "synthetic" / "train"
    with ShardWriter(folder, 0, "") as writer:
        for sample in Synthetic(side=data_scale.SIDE).read("train", [0, PER_SHARD]):
            writer.add(sample)
    receipts = [replace(writer.receipt, file=f"{shard_stem(number)}.arrow") for number in range(SHARDS)]
    for receipt in receipts[1:]:
        for suffix in (".arrow", ".npy", ".hashes.npy"):
            os.link((folder / writer.receipt.file).with_suffix(suffix), (folder / receipt.file).with_suffix(suffix))
    write_manifest(folder, build_manifest(folder, receipts, "synthetic", "train", asdict(Synthetic())))
    build_tokenizer(["a small red house on the old street"]).save_pretrained(root / "tokenizer")
    return root


def test_an_epoch_shows_a_million_samples_once(root):
    loader = data_scale.make_loader(root, str(root / "tokenizer"), batch_size=128)
    assert loader.epoch_size == 1_000_000
    data_scale.go_through(loader)


def test_a_killed_loader_goes_on_at_the_end_of_a_million(root):
    """The next batches are those that would have come, on as many ranks, on fewer and on more."""
    found = data_scale.resume(root, str(root / "tokenizer"), batch_size=64, group_by="length", steps=18)
    assert 6 <= found["killed_after_steps"] < 18


def test_read_pages_do_not_stay_in_the_process(root):
    split = Split(root / "synthetic" / "train")
    size = sum(shard["bytes"] for shard in split.manifest.shards)
    before = data_scale.memory(os.getpid())["VmRSS"]
    for position in np.random.default_rng(0).integers(0, len(split), 5000).tolist():
        assert split[position].id == f"synthetic/{position % PER_SHARD}"
    grown = data_scale.memory(os.getpid())["VmRSS"] - before
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(root) in line]
    assert len({name for name in mapped if name.endswith(".arrow")}) == SHARDS  # every shard is open
    assert size > 800e6 and grown < 40e6
