"""Receipts of shards, and the manifest that says what a prepared split holds and where it came from."""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from common.files import digest, file_sha256, sync, write_atomically
from data_prep.store.errors import DataError
from data_prep.store.sample import INDEX, INDEX_FILE, MAX_EXAMPLES, ROWS_PER_BATCH, SCHEMA_VERSION, shard_stem

MANIFEST = "manifest.json"
AGAIN = "run the python -m data_prep that made it again: what is sound is kept"
"""What to do about a damaged file of a prepared split."""
_SHARD_FILE = re.compile(r"shard-\d{5,}\.arrow")


@dataclass
class Shard:
    """Receipt of one finished shard. `sha256` is of the Arrow file, `content` of the samples alone; `beside` has the
    sha256 of the shard's other files by their suffix (none in receipts of earlier versions).
    """

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
    beside: dict[str, str] = field(default_factory=dict)

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the first of the shard's files, each read and compared with its sha256; none: nothing."""
        files = {self.file: self.sha256, **{Path(self.file).stem + end: value for end, value in self.beside.items()}}
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file_sha256(file) != expected:
                return f"{file} is not what was written (sha256)"
        return None


def read_receipt(folder: Path, number: int) -> Shard | None:
    """Receipt of shard `number`; none when the shard is not finished, or its receipt is damaged."""
    file = folder / f"{shard_stem(number)}.json"
    try:
        receipt = Shard(**_unseal(file.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError, IsADirectoryError, NotADirectoryError):
        return None
    return receipt if receipt.file == f"{shard_stem(number)}.arrow" else None


def write_receipt(folder: Path, receipt: Shard) -> None:
    """Write the receipt of a finished shard."""
    write_atomically((folder / receipt.file).with_suffix(".json"), _seal(asdict(receipt)))


def _seal(content: dict[str, Any]) -> str:
    """As JSON, with a checksum of its own."""
    return json.dumps({**content, "checksum": digest(content)}, indent=1) + "\n"


def _unseal(data: bytes) -> dict[str, Any]:
    """What `_seal` wrote, also by earlier versions, which wrote no checksum.

    Raises:
        ValueError: it is something else.
    """
    try:
        content = json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("nested without end") from error
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}")
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != digest(content):
        raise ValueError("its checksum differs")
    return content


@dataclass
class Manifest:
    """What a prepared split holds and where it came from.

    Attributes:
        fingerprint: Of the samples in their order (not of the machine or the time): equal data, equal fingerprint.
        made_from: Description of the source and options.
        statistics: Figures summed over the shards.
        index: sha256 of `index.npy`; empty in manifests of earlier versions.
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
    index: str = ""

    def check(self) -> None:
        """Raise a `ValueError` where a value cannot be: a file outside the folder, a sum that does not add up."""
        if not all(isinstance(getattr(self, key), int) for key in ("samples", "images", "dialogues", "rows_per_batch")):
            raise ValueError("its counts are no numbers")
        for shard in self.shards:
            if not isinstance(shard, dict) or not {"file", "samples", "bytes", "sha256"} <= shard.keys():
                raise ValueError("a shard is not described")
            if not _SHARD_FILE.fullmatch(str(shard["file"])):
                raise ValueError(f"{str(shard['file'])[:80]!r} is no file of a shard")
        if self.rows_per_batch < 1 or sum(shard["samples"] for shard in self.shards) != self.samples:
            raise ValueError("its shards have another number of samples")


def build_manifest(folder: Path, shards: list[Shard], dataset: str, split: str, made_from: dict[str, Any]) -> Manifest:
    """The manifest of a split from the receipts of all its shards, in order; writes the split's index."""
    index = _merge_index(folder, shards)
    hashes = [read_array(folder / Path(shard.file).with_suffix(".hashes.npy"), np.dtype("<u8")) for shard in shards]
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
        index=index,
    )


def map_array(file: Path) -> np.ndarray:
    """An array of a `.npy` file, memory-mapped.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no array. NumPy reads a damaged header as Python, and raises whatever Python does.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (EOFError, TypeError, OverflowError, MemoryError, SyntaxError, TokenError) as error:
        raise ValueError(f"no array ({error})") from error


def read_array(file: Path, dtype: np.dtype) -> np.ndarray:
    """A one-dimensional array of a prepared split, memory-mapped.

    Raises:
        DataError: it is missing or no such array.
    """
    try:
        found = map_array(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; {AGAIN}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is damaged: it is no array that can be read; {AGAIN}") from error
    if found.dtype != dtype or found.ndim != 1:
        raise DataError(f"{file} is damaged: it holds {found.dtype} {list(found.shape)}; {AGAIN}")
    return found


def _merge_index(folder: Path, shards: list[Shard]) -> str:
    """Write the split's index; returns its sha256."""
    temporary = folder / f".{INDEX_FILE}.{uuid.uuid4().hex}"
    with temporary.open("wb") as stream:
        size = sum(shard.samples for shard in shards)
        header = {"descr": np.lib.format.dtype_to_descr(INDEX), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(stream, header)
        for shard in shards:
            stream.write(read_array(folder / Path(shard.file).with_suffix(".npy"), INDEX).tobytes())
    sync(temporary)
    found = file_sha256(temporary)
    temporary.replace(folder / INDEX_FILE)
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` of a split."""
    write_atomically(folder / MANIFEST, _seal(asdict(manifest)))


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a prepared split.

    Raises:
        DataError: there is none, it cannot be read, or it is of another schema version.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder} is no prepared split (no {MANIFEST}); prepare it with python -m data_prep")
    try:
        content = _unseal(file.read_bytes())
        if content.get("schema_version") == SCHEMA_VERSION:
            manifest = Manifest(**content)
            manifest.check()
            return manifest
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged or no manifest ({error}); {AGAIN}") from error
    raise DataError(
        f"{file} has schema version {content.get('schema_version')}, this program reads {SCHEMA_VERSION}; "
        "prepare the data again"
    )
