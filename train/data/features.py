"""Features of a frozen vision encoder, computed once per different image and read from disk by memory mapping."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import DamagedFile, block_checksum, damage, digest, read_json, seal, sync, write_json
from data_prep.store.errors import DataError
from data_prep.store.manifest import map_array
from data_prep.store.pixels import ImageInput, PixelPreprocessor
from data_prep.store.split import Split

META, DAMAGED = "meta.json", "DAMAGED"
_EARLIER = "earlier.json"  # while a cache is made
log = logging.getLogger(__name__)
DTYPES = {"float32": (torch.float32, np.float32), "bfloat16": (torch.bfloat16, np.uint16)}
"""Names of stored dtypes: (torch, numpy); numpy has no bfloat16, so its bits are kept as uint16."""


class FeatureCache(ImageInput):
    """Cached features by image bytes.

    Files: `features.npy` [n, P, V], `keys.npy` (the sorted first 8 bytes of the images' sha256), `checksums.npy` (XXH3
    of each image's features, verified whenever they are read), `meta.json` (checksums of the other two); `DAMAGED`
    once features were read that are not what was written.

    Args:
        folder: Of a finished cache.

    Raises:
        DamagedFile: one of its files is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.meta = read_json(self.folder / META, "the cache is made anew")
        if (self.folder / DAMAGED).exists():
            raise DamagedFile(f"{self.folder}: {(self.folder / DAMAGED).read_text(encoding='utf-8').strip()}")
        if problem := damage(self.folder, self.meta.get("files", {META: {"size": 0}})):
            raise DamagedFile(f"{self.folder}: {problem}")
        self.dtype, stored = DTYPES[self.meta["dtype"]]
        try:
            self._keys, self._checksums, self._features = (
                map_array(self.folder / f"{name}.npy") for name in ("keys", "checksums", "features")
            )
        except (OSError, ValueError) as error:
            raise DamagedFile(f"{self.folder}: features.npy is damaged ({error})") from error
        if (list(self._features.shape), self._features.dtype) != (self.meta["shape"], np.dtype(stored)):
            raise DamagedFile(f"{self.folder}: features.npy is not what was written")

    def __reduce__(self):  # to a loader process: opened anew, where pickling the maps would copy all features
        return type(self), (self.folder,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(P, V) of one image."""
        return tuple(self._features.shape[1:])

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, data: bytes) -> list[np.ndarray]:
        """Features of one image file, still on disk.

        Raises:
            DataError: the image is not in the cache, or its features are damaged.
        """
        return [self.of(image_key(data))]

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of these keys it holds, bool."""
        return np.isin(keys, self._keys)

    def of(self, key: np.uint64) -> np.ndarray:
        """Features of the image with this key, still on disk.

        Raises:
            DataError: as `read`.
        """
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            raise DataError(f"an image is not in the feature cache {self.folder}; delete the folder to make it anew")
        features = self._features[at]
        if _checksum(features) != self._checksums[at]:
            with suppress(OSError):
                (self.folder / DAMAGED).write_text(
                    f"the features of image {at} are not what was written\n", encoding="utf-8"
                )
            raise DataError(
                f"feature cache {self.folder} is damaged: the features of image {at} are not what was written; start "
                "the run again, which makes the cache anew and resumes"
            )
        return features

    def write(self, views: list[np.ndarray], out: Tensor) -> None:
        """Features that were read into `out` [n, P, V]."""
        rows = (out.view(torch.uint16) if self.dtype is torch.bfloat16 else out).numpy()
        for row, view in zip(rows, views, strict=True):
            row[...] = view


def image_key(data: bytes) -> np.uint64:
    """The first 8 bytes of the sha256 of an image file, big-endian."""
    return np.uint64(int.from_bytes(hashlib.sha256(data).digest()[:8], "big"))


def split_keys(split: Split) -> np.ndarray:
    """Sorted keys of the different images of a split's readable shards, from the hashes kept beside them."""
    return np.unique(split.image_hashes())


def ensure_feature_cache(
    folder: Path,
    splits: list[Split],
    pixels: PixelPreprocessor,
    encode: Callable[[Tensor], Tensor],
    vision_fingerprint: str,
    dtype: str = "bfloat16",
    batch_size: int = 32,
    run: str = "",
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> FeatureCache:
    """The cache of all images of `splits`, made first when there is none that matches.

    Collective: every rank fills its part of one shared file; rank 0 makes it final. Features that caches of other sets
    of images hold, made in the same way, are copied from there, and only the others encoded.

    Args:
        folder: Parent of the caches; each lies in a folder named by its fingerprint.
        splits: Whose images are needed; not those of shards that cannot be read, where a split need not be whole.
        pixels: Image mode, size and normalisation.
        encode: Pixels [I, 3, H, W] -> features [I, P, V].
        vision_fingerprint: Of the encoder's weights and of which layer and tokens are read.
        dtype: `float32` or `bfloat16`, of the stored features.
        batch_size: Images per call of `encode`.
        run: Id of the run; runs that begin together (points of a sweep) each make the cache, the first to end is kept.
        rank, world_size, barrier: Of the process group.

    Raises:
        DataError: an image cannot be read (naming shard and sample), or no room on disk.
    """
    for problem in [problem for split in splits for problem in split.corrupt().values()] if rank == 0 else ():
        log.warning("%s; its %d samples are left out of the feature cache", problem, problem.samples)
    keys = np.unique(np.concatenate([np.empty(0, "<u8"), *map(split_keys, splits)]))
    fingerprint = digest(
        [vision_fingerprint, pixels.fingerprint, dtype, hashlib.sha256(keys.astype("<u8").tobytes()).hexdigest()]
    )
    target = Path(folder) / f"features-{fingerprint[:16]}"
    cache, damaged = None, ""
    if target.exists():
        try:
            cache = FeatureCache(target)
        except DamagedFile as error:
            damaged = str(error)
    barrier()  # so that all ranks have looked before any goes on to make it
    if cache is not None:
        return cache
    if damaged and rank == 0:
        print(f"warning: the feature cache is damaged and is made anew: {damaged}", file=sys.stderr, flush=True)
        shutil.rmtree(target)
    working = target.with_name(f".{target.name}.{run}.working")
    blank = torch.zeros(1, 3, pixels.size, pixels.size)
    shape = (len(keys), *encode(blank).shape[1:])  # on every rank alike: ZeRO-3 gathers weights in it
    made = {"dtype": dtype, "vision": vision_fingerprint, "pixels": pixels.fingerprint}
    if rank == 0:
        _allocate(working, shape, np.dtype(DTYPES[dtype][1]))
        # Written down, for another run may make one more before all ranks have looked.
        write_json(working / _EARLIER, {"caches": _earlier(target.parent, made)})
    barrier()
    earlier = read_json(working / _EARLIER, "start the run again")["caches"]
    missing = _copy_part(working, earlier, keys, rank, world_size)
    part = missing[len(missing) * rank // world_size : len(missing) * (rank + 1) // world_size]
    calls = _encode_part(working, _batches(splits, keys[part], pixels, batch_size), encode, dtype, part)
    largest = -(-len(missing) // world_size)
    for _ in range(-(-largest // batch_size) - calls):  # as many calls as the rank with most images
        encode(blank)
    barrier()
    if rank == 0:
        _publish(working, target, keys, made | {"shape": list(shape)})
    barrier()
    return FeatureCache(target)


def _earlier(folder: Path, made: dict[str, str]) -> list[str]:
    """The sound caches in `folder` that were made in this way, by name."""
    found = []
    for path in sorted(folder.glob("features-*")):
        with suppress(DamagedFile):
            if made.items() <= FeatureCache(path).meta.items():
                found.append(path.name)
    return found


def _copy_part(working: Path, earlier: list[str], keys: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Copy a rank's part of the features that earlier caches hold; returns the positions of the others, of all ranks.

    Raises:
        DataError: features there are damaged; their cache is left out the next time.
    """
    features, checksums = _shared(working)
    left = np.ones(len(keys), dtype=bool)
    for name in earlier:
        try:
            cache = FeatureCache(working.parent / name)
        except DamagedFile as error:  # what another rank has found a moment ago
            raise DataError(f"a feature cache is damaged: {error}; start the run again, which leaves it out") from error
        there = np.flatnonzero(left & cache.has(keys))
        left[there] = False
        for at in there[len(there) * rank // world_size : len(there) * (rank + 1) // world_size]:
            features[at] = cache.of(keys[at])
            checksums[at] = _checksum(features[at])
    features.flush()
    checksums.flush()
    return np.flatnonzero(left)


def _shared(working: Path) -> tuple[np.memmap, np.memmap]:
    """Features and checksums of the cache that is being made, for writing."""
    features, checksums = (
        np.lib.format.open_memmap(working / name, mode="r+") for name in ("features.npy", "checksums.npy")
    )
    return features, checksums


def _encode_part(
    working: Path,
    batches: Iterator[tuple[np.ndarray, Tensor, list[str]]],
    encode: Callable[[Tensor], Tensor],
    dtype: str,
    part: np.ndarray,
) -> int:
    """Fill these positions of the shared files; returns how often `encode` was called.

    Raises:
        DataError: features that are not finite; names shard and sample.
    """
    features, checksums = _shared(working)
    torch_dtype, calls = DTYPES[dtype][0], 0
    for at, stack, names in batches:
        out = encode(stack).detach().to("cpu", torch_dtype).contiguous()
        if not (sound := out.isfinite().flatten(1).all(1)).all():
            raise DataError(
                f"the vision encoder's features of {names[int((~sound).nonzero()[0])]} are not finite: its weights "
                "(vision.path) are damaged, or a value overflows"
            )
        rows = (out.view(torch.uint16) if torch_dtype is torch.bfloat16 else out).numpy()
        features[part[at]] = rows
        checksums[part[at]] = [_checksum(row) for row in rows]
        calls += 1
    features.flush()
    checksums.flush()
    return calls


def _publish(working: Path, target: Path, keys: np.ndarray, meta: dict[str, Any]) -> None:
    """Give a cache that all ranks have filled its keys, its record and its name."""
    (working / _EARLIER).unlink()
    np.save(working / "keys.npy", keys)
    meta |= {"images": len(keys), "files": seal(working, ["keys.npy", "checksums.npy"])}
    sync(working / "features.npy")
    write_json(working / META, meta)
    try:
        working.rename(target)
    except OSError:
        if not (target / META).is_file():
            raise
        shutil.rmtree(working)  # another run was faster


def _allocate(working: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An empty features file, unless the disk is too small."""
    shutil.rmtree(working, ignore_errors=True)  # of a run that was killed
    working.mkdir(parents=True)
    needed, free = int(np.prod(shape)) * dtype.itemsize, shutil.disk_usage(working).free
    if needed > free:
        working.rmdir()
        raise DataError(
            f"no room on disk for the feature cache in {working.parent}: it needs {needed >> 20} MB, "
            f"{free >> 20} MB are free; free some, or set vision.cache=false"
        )
    np.lib.format.open_memmap(working / "features.npy", mode="w+", dtype=dtype, shape=shape).flush()
    np.lib.format.open_memmap(working / "checksums.npy", mode="w+", dtype=np.uint64, shape=shape[:1]).flush()


def _batches(
    splits: list[Split], keys: np.ndarray, pixels: PixelPreprocessor, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor, list[str]]]:
    """(positions in `keys`, pixels, shard and sample) of the images with these keys, each once."""
    left = np.ones(len(keys), dtype=bool)
    positions: list[int] = []
    images: list[Tensor] = []
    names: list[str] = []
    for split in splits:
        for number in split.positions() if left.any() else ():
            sample = split[number]
            for data in sample.images:
                key = image_key(data)
                at = int(np.searchsorted(keys, key))
                if at == len(keys) or keys[at] != key or not left[at]:
                    continue
                left[at] = False
                try:
                    images.append(pixels(data)[0])
                except Exception as error:  # whatever a decoder raises, the sample is named
                    where = f"{split.shard_of(number)}: sample {sample.id}"
                    raise DataError(f"{where}: {error or type(error).__name__}") from error
                positions.append(at)
                names.append(f"{split.shard_of(number)}: sample {sample.id}")
                if len(images) == batch_size:
                    yield np.array(positions), torch.stack(images), names
                    positions, images, names = [], [], []
    if images:
        yield np.array(positions), torch.stack(images), names


def _checksum(features: np.ndarray) -> int:
    return block_checksum(np.ascontiguousarray(features).data.cast("B"))
