"""Reads a prepared split by memory mapping."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.files import file_sha256
from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.manifest import AGAIN, read_array, read_manifest
from data_prep.store.sample import ARROW, INDEX, INDEX_FILE, WITHOUT_REFERENCES, Sample

OPEN_SHARDS = 256
"""Shards that one `Split` keeps mapped: each holds a file descriptor, of which a process may have 1024."""


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

    `split[i]` is sample `i`; the order is that of the shards. Shards are opened on first use, so an instance can go
    to worker processes.

    Args:
        folder: `<root>/<dataset>/<split>`.
        whole: Refuse a split with a missing or cut shard now, not when a sample of it is read, and let a corrupt one
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
        """File of the shard that holds sample `position`."""
        return self.folder / self.manifest.shards[self._shard(position)]["file"]

    def _open(self, number: int) -> _OpenShard:
        """Shard `number`, opened, and on the first time checked as a whole, so that whether a shard is corrupt does
        not depend on which of its samples is asked for.
        """
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
                f"shard {file} is corrupt ({error}); {AGAIN}",
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
        """Sample `position` without its images, which are not read."""
        return Sample(**self._read(position, [name for name in ARROW.names if name != "images"]), images=[])

    def _read(self, position: int, columns: list[str]) -> dict[str, Any]:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number = self._shard(position)
        at, row = divmod(position - int(self._starts[number]), self.manifest.rows_per_batch)
        shard = self._open(number)
        batch = shard.reader.get_batch(at)
        found = {name: batch.column(name)[row].as_py() for name in columns if name in batch.schema.names}
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
        """`INDEX` records of all samples, memory-mapped: shared by all processes of a machine.

        Raises:
            DataError: its file is damaged.
        """
        if self._index is None:
            file = self.folder / INDEX_FILE
            if file.exists():
                found = read_array(file, INDEX)
                if self.manifest.index and file_sha256(file) != self.manifest.index:
                    raise DataError(f"{file} is damaged: it is not what was written (sha256); {AGAIN}")
            else:  # prepared before there was such a file, or lost: it holds nothing else
                files = [self.folder / Path(shard["file"]).with_suffix(".npy") for shard in self.manifest.shards]
                found = np.concatenate([np.empty(0, INDEX), *(read_array(each, INDEX) for each in files)])
            sums = [len(found), int(found["images"].sum()), int(found["dialogues"].sum())]
            if sums != [self.manifest.samples, self.manifest.images, self.manifest.dialogues]:
                raise DataError(f"{file} is damaged: its sums are not the manifest's; {AGAIN}")
            self._index = found
        return self._index

    def image_hashes(self) -> np.ndarray:
        """The first 8 bytes of the sha256 of every image of the shards that can be read, uint64, in order.

        Raises:
            DataError: a file of them is damaged.
        """
        shards = [shard for number, shard in enumerate(self.manifest.shards) if number not in self.corrupt()]
        files = [self.folder / Path(shard["file"]).with_suffix(".hashes.npy") for shard in shards]
        found = [read_array(file, np.dtype("<u8")) for file in files]
        if not self.corrupt() and sum(map(len, found)) != self.manifest.images:
            raise DataError(f"{self.folder}: the .hashes.npy files are not of its images; {AGAIN}")
        return np.concatenate([np.empty(0, "<u8"), *found])

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest.

        Raises:
            DataError: naming the first shard that differs.
        """
        for shard in self.manifest.shards:
            if (got := file_sha256(self.folder / shard["file"])) != shard["sha256"]:
                raise DataError(
                    f"shard {self.folder / shard['file']}: expected sha256 {shard['sha256']}, got {got}; {AGAIN}"
                )
        self.index()
        self.image_hashes()


def _check_size(folder: Path, shard: dict[str, Any]) -> None:
    file = folder / shard["file"]
    size = file.stat().st_size if file.is_file() else None
    if size != shard["bytes"]:
        found = "it is missing" if size is None else f"it has {size} bytes"
        raise CorruptShardError(
            f"shard {file} should have {shard['bytes']} bytes, {found}; {AGAIN}",
            file,
            shard["samples"],
        )


def _check_structure(shard: _OpenShard, samples: int) -> None:
    """That a shard has the schema, the samples and sound offsets and texts; image bytes are not looked at.

    Raises:
        pa.ArrowException, ValueError: it has not.
    """
    reader = shard.reader
    if reader.schema not in (ARROW, WITHOUT_REFERENCES):
        raise ValueError(f"its columns are {reader.schema.names}")
    rows = 0
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        batch.validate(full=True)
        rows += len(batch)
        shard.release()
    if rows != samples:
        raise ValueError(f"it has {rows} samples, the manifest says {samples}")
