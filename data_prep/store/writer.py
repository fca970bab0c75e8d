"""Writes the shards of a prepared split."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.files import digest, file_sha256, sync
from data_prep.store.manifest import Manifest, Shard, build_manifest, write_manifest, write_receipt
from data_prep.store.sample import ARROW, INDEX, MAX_EXAMPLES, ROWS_PER_BATCH, Dropped, Sample, shard_stem


class ShardWriter:
    """Writes one shard; leaving the `with` block without an error makes it final, with its receipt.

    Args:
        folder: Of the split.
        number: Of the shard.
        made_from: Digest of everything the shard depends on; a receipt with another digest is not trusted later.
    """

    def __init__(self, folder: Path, number: int, made_from: str) -> None:
        self.folder = folder
        self.stem = shard_stem(number)
        self.receipt = Shard(file=f"{self.stem}.arrow", made_from=made_from)
        self._rows: list[dict] = []
        self._index: list[tuple[int, int, int]] = []
        self._content = hashlib.sha256()
        self._hashes: list[int] = []
        self._sources: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.stem}.json").unlink(missing_ok=True)
        for pattern in (f".{self.stem}.*.tmp", f".{self.stem}.json.*"):  # of a task that was killed
            for leftover in self.folder.glob(pattern):
                leftover.unlink()
        self._temporary = self.folder / f".{self.stem}.{os.getpid()}.tmp"
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, ARROW)
        return self

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        row = dict(vars(sample))  # not asdict: it copies every turn
        self._rows.append(row)
        characters = sum(len(turn["content"]) for dialogue in sample.conversations for turn in dialogue)
        self._index.append((len(sample.images), len(sample.conversations), characters))
        hashes = [hashlib.sha256(image).hexdigest() for image in sample.images]
        self._hashes += [int(value[:16], 16) for value in hashes]
        described = {**row, "images": hashes}
        if not sample.references:  # so that data without any have the fingerprint they always had
            del described["references"]
        self._content.update(digest(described).encode())
        self._sources[sample.source] += 1
        self.receipt.text_only += not sample.images
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def drop(self, dropped: Dropped) -> None:
        """Count a record that is left out, keeping the first examples."""
        self._dropped[dropped.reason] += 1
        if self._dropped[dropped.reason] <= MAX_EXAMPLES:
            self.receipt.dropped_examples.append(asdict(dropped))

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=ARROW))
            self._rows.clear()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._sink.close()
        if error is not None:
            self._temporary.unlink()
            return
        index = np.array(self._index, dtype=INDEX)
        receipt = self.receipt
        for end, values in ((".npy", index), (".hashes.npy", np.array(self._hashes, dtype="<u8"))):
            np.save(file := self.folder / f"{self.stem}{end}", values)
            sync(file)
            receipt.beside[end] = file_sha256(file)
        receipt.samples = len(index)
        receipt.images = int(index["images"].sum())
        receipt.dialogues = int(index["dialogues"].sum())
        receipt.sources = dict(sorted(self._sources.items()))
        receipt.dropped = dict(sorted(self._dropped.items()))
        receipt.bytes = self._temporary.stat().st_size
        receipt.sha256 = file_sha256(self._temporary)
        receipt.content = self._content.hexdigest()
        sync(self._temporary)
        self._temporary.replace(self.folder / receipt.file)
        write_receipt(self.folder, receipt)


def write_split(
    folder: Path, samples: Iterable[Sample], dataset: str = "unnamed", made_from: dict[str, Any] | None = None
) -> Manifest:
    """Write `samples` as a split of one shard; for small sets and tests.

    Returns:
        Its manifest, which was also written.
    """
    made_from = made_from or {}
    with ShardWriter(folder, 0, digest(made_from)) as writer:
        for sample in samples:
            writer.add(sample)
    manifest = build_manifest(folder, [writer.receipt], dataset, folder.name, made_from)
    write_manifest(folder, manifest)
    return manifest
