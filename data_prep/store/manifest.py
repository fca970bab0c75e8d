"""Receipts of shards, and the manifest that says what a prepared split holds and where it came from."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.files import digest, sync, write_atomically
from data_prep.store.errors import DataError
from data_prep.store.sample import INDEX, INDEX_FILE, MAX_EXAMPLES, ROWS_PER_BATCH, SCHEMA_VERSION, shard_stem

MANIFEST = "manifest.json"


@dataclass
class Shard:
    """Receipt of one finished shard. `sha256` is of the Arrow file, `content` of the samples alone."""

    file: str
    samples: int = 0
    images: int = 0
    dialogues: int = 0
    text_only: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_examples: list[dict[str, str]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    sha256: str = ""
    content: str = ""
    made_from: str = ""


def read_receipt(folder: Path, number: int) -> Shard | None:
    """Receipt of shard `number`; none when the shard is not finished."""
    file = folder / f"{shard_stem(number)}.json"
    return Shard(**json.loads(file.read_text())) if file.is_file() else None


@dataclass
class Manifest:
    """What a prepared split holds and where it came from.

    Attributes:
        fingerprint: Of the samples in their order (not of the machine or the time): equal data, equal fingerprint.
        made_from: Description of the source and options.
        statistics: Figures summed over the shards.
    """

    dataset: str
    split: str
    fingerprint: str
    samples: int
    images: int
    unique_images: int
    dialogues: int
    text_only: int
    sources: dict[str, int]
    dropped: dict[str, int]
    dropped_examples: list[dict[str, str]]
    statistics: dict[str, Any]
    made_from: dict[str, Any]
    shards: list[dict[str, Any]]
    schema_version: int = SCHEMA_VERSION
    rows_per_batch: int = ROWS_PER_BATCH


def build_manifest(folder: Path, shards: list[Shard], dataset: str, split: str, made_from: dict[str, Any]) -> Manifest:
    """The manifest of a split from the receipts of all its shards, in order; writes the split's index."""
    _merge_index(folder, shards)
    hashes = [np.load(folder / Path(shard.file).with_suffix(".hashes.npy"), allow_pickle=False) for shard in shards]
    unique = len(np.unique(np.concatenate([np.empty(0, "<u8"), *hashes])))

    def total(name: str) -> dict[str, int]:
        return dict(sorted(sum((Counter(getattr(shard, name)) for shard in shards), Counter()).items()))

    examples: Counter[str] = Counter()
    kept = []
    for example in (example for shard in shards for example in shard.dropped_examples):
        examples[example["reason"]] += 1
        if examples[example["reason"]] <= MAX_EXAMPLES:
            kept.append(example)
    statistics: dict[str, Counter] = {}
    for shard in shards:
        for name, counts in shard.statistics.items():
            statistics.setdefault(name, Counter()).update(counts)
    return Manifest(
        dataset=dataset,
        split=split,
        fingerprint=digest([SCHEMA_VERSION, [shard.content for shard in shards if shard.samples]]),
        samples=sum(shard.samples for shard in shards),
        images=sum(shard.images for shard in shards),
        unique_images=unique,
        dialogues=sum(shard.dialogues for shard in shards),
        text_only=sum(shard.text_only for shard in shards),
        sources=total("sources"),
        dropped=total("dropped"),
        dropped_examples=kept,
        statistics={name: dict(sorted(counts.items())) for name, counts in statistics.items()},
        made_from=made_from,
        shards=[
            {"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in shards if s.samples
        ],
    )


def _merge_index(folder: Path, shards: list[Shard]) -> None:
    temporary = folder / f".{INDEX_FILE}.{uuid.uuid4().hex}"
    with temporary.open("wb") as stream:
        size = sum(shard.samples for shard in shards)
        header = {"descr": np.lib.format.dtype_to_descr(INDEX), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(stream, header)
        for shard in shards:
            stream.write(np.load(folder / Path(shard.file).with_suffix(".npy"), allow_pickle=False).tobytes())
    sync(temporary)
    temporary.replace(folder / INDEX_FILE)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` of a split."""
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a prepared split.

    Raises:
        DataError: there is none, it cannot be read, or it is of another schema version.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder} is no prepared split (no {MANIFEST}); prepare it with python -m data_prep")
    try:
        content = json.loads(file.read_text())
        if content.get("schema_version") == SCHEMA_VERSION:
            return Manifest(**content)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a manifest ({error}); prepare the data again") from error
    raise DataError(
        f"{file} has schema version {content.get('schema_version')}, this program reads {SCHEMA_VERSION}; "
        "prepare the data again"
    )
