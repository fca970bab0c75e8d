"""The one sample schema, its shards on disk, and the manifest that describes a prepared split.

A *sample* is one set of images with one or more independent dialogues about it:

    {id: str, images: [bytes], conversations: [[{role, content}, ...], ...], source: str}

An image with ten questions is therefore stored, encoded and turned into weights once. A caption is a dialogue whose
user turn is empty; a text-only sample has no images. Images are the source's own bytes, never re-encoded.

A prepared split is a folder ``<root>/<dataset>/<split>`` with, per shard,

    shard-00000.arrow   the samples: an Arrow IPC file, uncompressed, so that any sample is one memory-mapped look-up
                        (``datasets.load_dataset("arrow", data_files=...)`` reads it as well)
    shard-00000.npy     per sample: images, dialogues and characters (``INDEX``), what a sampler sorts by
    shard-00000.hashes.npy   the first 8 bytes of every image's sha256, to count duplicates
    shard-00000.json    receipt: counts, sha256, what was dropped; written last, so a shard with a receipt is whole

and, once all shards are there, ``index.npy`` (the shards' in one, for all ranks of a machine to map) and
``manifest.json``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.errors import CorruptShardError, DataError

SCHEMA_VERSION = 1
ROLES = ("system", "user", "assistant")
ROWS_PER_BATCH = 64
"""Samples per Arrow record batch: position ``i`` is row ``i % 64`` of batch ``i // 64``."""

_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
ARROW = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("conversations", pa.list_(pa.list_(_TURN))),
        ("source", pa.string()),
    ]
)
INDEX = np.dtype([("images", "<u2"), ("dialogues", "<u2"), ("characters", "<u4")])
MANIFEST = "manifest.json"
INDEX_FILE = "index.npy"
OPEN_SHARDS = 256
"""Shards that one ``Split`` keeps mapped: each holds a file descriptor, of which a process may have 1024."""
MAX_EXAMPLES = 10

Turn = dict[str, str]
Dialogue = list[Turn]


@dataclass
class Sample:
    """One set of images and the dialogues about it; see the module's docstring.

    Attributes:
        id: unique in its dataset.
        images: encoded image files, possibly none.
        conversations: dialogues, each a list of ``{"role": ..., "content": ...}``.
        source: where it comes from, e.g. the dataset's name or a part of it.
    """

    id: str
    images: list[bytes]
    conversations: list[Dialogue]
    source: str


@dataclass
class Dropped:
    """A record of the source that did not become a sample.

    Attributes:
        id: of the record, as good as the source names it.
        reason: short and countable, e.g. ``image missing``.
        detail: what exactly, e.g. the file.
    """

    id: str
    reason: str
    detail: str = ""


@dataclass
class Count:
    """Something in the source that is neither a sample nor a defect, and still belongs into the manifest's statistics.

    Attributes:
        name: of the statistic, e.g. ``not fetched``.
        value: what was met, e.g. ``HTTP Error 404``.
        number: how often.
    """

    name: str
    value: str
    number: int = 1


@dataclass
class Shard:
    """Receipt of one finished shard. ``sha256`` is of the Arrow file, ``content`` of the samples alone."""

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


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_atomically(file: Path, text: str) -> None:
    """Write ``file`` so that a reader, or the next boot, sees the old text or the new, never a part."""
    # A name of its own for each writer: the tasks of a job array may write the same file at the same time.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w") as stream:
            stream.write(text)
        sync(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes one shard; leaving the ``with`` block without an error makes it final, with its receipt.

    Args:
        folder: of the split.
        number: of the shard.
        made_from: digest of everything the shard depends on; a receipt with another digest is not trusted later.
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
        for leftover in self.folder.glob(f".{self.stem}.*.tmp"):  # of a task that was killed
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
        self._content.update(digest({**row, "images": hashes}).encode())
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

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self._flush()
        self._writer.close()
        self._sink.close()
        if error is not None:
            self._temporary.unlink()
            return
        index = np.array(self._index, dtype=INDEX)
        np.save(self.folder / f"{self.stem}.npy", index)
        np.save(self.folder / f"{self.stem}.hashes.npy", np.array(self._hashes, dtype="<u8"))
        receipt = self.receipt
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
        write_atomically(self.folder / f"{self.stem}.json", json.dumps(asdict(receipt), indent=1) + "\n")


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_stem(number: int) -> str:
    """File name of a shard without its suffix."""
    return f"shard-{number:05d}"


def read_receipt(folder: Path, number: int) -> Shard | None:
    """Receipt of shard ``number``; none when the shard is not finished."""
    file = folder / f"{shard_stem(number)}.json"
    return Shard(**json.loads(file.read_text())) if file.is_file() else None


@dataclass
class Manifest:
    """What a prepared split holds and where it came from.

    Attributes:
        fingerprint: of the samples in their order (not of the machine or the time): equal data, equal fingerprint.
        made_from: description of the source and options.
        statistics: figures summed over the shards.
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


def merge(folder: Path, shards: list[Shard], dataset: str, split: str, made_from: dict[str, Any]) -> Manifest:
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
    """Write ``manifest.json`` of a split."""
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


class _OpenShard:
    """A shard's file, mapped.

    Raises:
        pa.ArrowException, OSError, ValueError: it is no Arrow file.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.reader = pa.ipc.open_file(pa.py_buffer(self._map))

    def release(self) -> None:
        """Take the pages read so far out of this process; they stay in the machine's page cache.

        Without this a process that reads in random order ends with all shards resident.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


class Split:
    """A prepared split, read by memory mapping: nothing is held in memory but the positions of the shards.

    ``split[i]`` is sample ``i``; the order is that of the shards. Shards are opened on first use, so an instance can go
    to worker processes.

    Args:
        folder: ``<root>/<dataset>/<split>``.
        whole: refuse a split with a missing or cut shard now, not when a sample of it is read, and let a corrupt one
            end an iteration, which otherwise leaves its samples out.

    Raises:
        DataError: no manifest.
        CorruptShardError: a shard is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path | str, whole: bool = True) -> None:
        self.folder, self.whole = Path(folder), whole
        self.manifest = read_manifest(self.folder)
        for shard in self.manifest.shards if whole else ():
            _check_size(self.folder, shard)
        self._starts = np.cumsum([0] + [shard["samples"] for shard in self.manifest.shards])
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._sound: set[int] = set()
        self._corrupt: dict[int, CorruptShardError] | None = None
        self._index: np.ndarray | None = None

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": OrderedDict(), "_index": None}

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data."""
        return self.manifest.fingerprint

    def _shard(self, position: int) -> int:
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def shard_of(self, position: int) -> Path:
        """File of the shard that holds sample ``position``."""
        return self.folder / self.manifest.shards[self._shard(position)]["file"]

    def _open(self, number: int) -> _OpenShard:
        """Shard ``number``, opened, and on the first time checked as a whole, so that whether a shard is corrupt does
        not depend on which of its samples is asked for."""
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        shard = self.manifest.shards[number]
        file = self.folder / shard["file"]
        _check_size(self.folder, shard)
        try:
            opened = _OpenShard(file)
            if number not in self._sound:
                _check_structure(opened, shard["samples"])
                self._sound.add(number)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShardError(
                f"shard {file} is corrupt ({error}); compare it with the sha256 in the manifest, and prepare it again",
                file,
                shard["samples"],
            ) from error
        if len(self._opened) >= OPEN_SHARDS:
            self._opened.popitem(last=False)
        self._opened[number] = opened
        return opened

    def __getitem__(self, position: int) -> Sample:
        return Sample(**self._read(position, ARROW.names))

    def text(self, position: int) -> Sample:
        """Sample ``position`` without its images, which are not read."""
        return Sample(**self._read(position, [name for name in ARROW.names if name != "images"]), images=[])

    def _read(self, position: int, columns: list[str]) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number = self._shard(position)
        at, row = divmod(position - int(self._starts[number]), self.manifest.rows_per_batch)
        shard = self._open(number)
        batch = shard.reader.get_batch(at)
        found = {name: batch.column(name)[row].as_py() for name in columns}
        shard.release()
        return found

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in self.positions())

    def positions(self) -> Iterator[int]:
        """Positions of all samples, in order, but for those of `corrupt` shards."""
        for number in range(len(self.manifest.shards)):
            if number not in self.corrupt():
                yield from range(int(self._starts[number]), int(self._starts[number + 1]))

    def corrupt(self) -> dict[int, CorruptShardError]:
        """Shards that cannot be read and may be left out, by number; none, unchecked, where the split must be whole."""
        if self._corrupt is None:
            self._corrupt = {}
            for number in range(0 if self.whole else len(self.manifest.shards)):
                try:
                    self._open(number)
                except CorruptShardError as error:
                    self._corrupt[number] = error
        return self._corrupt

    def check(self, positions: np.ndarray) -> None:
        """Open all shards that hold these samples.

        Raises:
            CorruptShardError: one cannot be read.
        """
        for number in np.unique(np.searchsorted(self._starts, positions, side="right") - 1).tolist():
            self._open(number)

    def index(self) -> np.ndarray:
        """``INDEX`` records of all samples, memory-mapped: shared by all processes of a machine."""
        if self._index is None:
            if (file := self.folder / INDEX_FILE).is_file() and len(self):
                self._index = np.load(file, mmap_mode="r", allow_pickle=False)
            if self._index is None or len(self._index) != len(self):  # prepared before there was such a file
                files = [self.folder / Path(shard["file"]).with_suffix(".npy") for shard in self.manifest.shards]
                parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
                self._index = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, INDEX), *parts])
        return self._index

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest.

        Raises:
            DataError: naming the first shard that differs.
        """
        for shard in self.manifest.shards:
            if (got := file_sha256(self.folder / shard["file"])) != shard["sha256"]:
                raise DataError(
                    f"shard {self.folder / shard['file']}: expected sha256 {shard['sha256']}, got {got}; "
                    "delete its .json receipt and the manifest, and prepare the data again"
                )


def _check_size(folder: Path, shard: dict[str, Any]) -> None:
    file = folder / shard["file"]
    size = file.stat().st_size if file.is_file() else None
    if size != shard["bytes"]:
        found = "it is missing" if size is None else f"it has {size} bytes"
        raise CorruptShardError(
            f"shard {file} should have {shard['bytes']} bytes, {found}; "
            "delete its .json receipt and the manifest, and prepare the data again",
            file,
            shard["samples"],
        )


def _check_structure(shard: _OpenShard, samples: int) -> None:
    """That a shard has the schema, the samples and sound offsets and texts; image bytes are not looked at.

    Raises:
        pa.ArrowException, ValueError: it has not.
    """
    reader = shard.reader
    if reader.schema != ARROW:
        raise ValueError(f"its columns are {reader.schema.names}")
    rows = 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batch.validate(full=True)
        rows += len(batch)
        shard.release()
    if rows != samples:
        raise ValueError(f"it has {rows} samples, the manifest says {samples}")


def write_split(
    folder: Path, samples: Iterable[Sample], dataset: str = "unnamed", made_from: dict[str, Any] | None = None
) -> Manifest:
    """Write ``samples`` as a split of one shard; for small sets and tests.

    Returns:
        Its manifest, which was also written.
    """
    made_from = made_from or {}
    with ShardWriter(folder, 0, digest(made_from)) as writer:
        for sample in samples:
            writer.add(sample)
    manifest = merge(folder, [writer.receipt], dataset, folder.name, made_from)
    write_manifest(folder, manifest)
    return manifest
