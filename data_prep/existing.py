"""What a folder already holds: data that must not be replaced, shards that are sound, and those that are damaged."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.files import digest, file_sha256
from data_prep.store.errors import DataError
from data_prep.store.manifest import MANIFEST, Manifest, Shard, read_manifest, read_receipt
from data_prep.store.sample import INDEX_FILE

PROGRAM = ("schema_version", "reader")
"""Of `made_from`, what changes with the program and not with the data: a new version makes them anew unasked."""


def complete(folder: Path, key: str) -> Manifest | None:
    """The manifest of a split that was made from what `key` says, its index sound; none: it has to be made (again)."""
    manifest = _manifest(folder)
    if manifest is None or digest(manifest.made_from) != key:
        return None
    index = folder / INDEX_FILE
    sound = index.is_file() and manifest.index in ("", file_sha256(index))
    return manifest if sound else None


def refuse_others(folder: Path, made_from: dict[str, Any], overwrite: bool) -> None:
    """Make way for a split that is to be made from `made_from`.

    Args:
        folder: Of the split.
        made_from: What the new data depend on.
        overwrite: Whether data that were made from something else may be deleted.

    Raises:
        DataError: there are such data, finished or not, and they may not.
    """
    key, manifest = digest(made_from), _manifest(folder)
    found = [read_receipt(folder, _number(file)) for file in sorted(folder.glob("shard-*.json"))]
    others = [receipt for receipt in found if receipt is not None and receipt.made_from != key]
    changed = [] if manifest is None else differences(manifest.made_from, made_from)
    replaced = (manifest is not None and digest(manifest.made_from) != key) or bool(others)
    if not replaced:
        return
    if not overwrite and (changed if manifest is not None else others):
        why = f"({', '.join(changed)} differ)" if manifest is not None else "(and was not finished)"
        raise DataError(
            f"{folder} was made from something else {why}; choose another name=NAME, "
            "or delete what is there and make it anew with overwrite=true"
        )
    (folder / MANIFEST).unlink(missing_ok=True)
    for receipt in others:  # not those of another task of this very preparation
        stem = Path(receipt.file).stem
        for end in (".json", ".arrow", ".npy", ".hashes.npy"):
            (folder / f"{stem}{end}").unlink(missing_ok=True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the values in which two descriptions of data differ, those of the program left out."""
    found = []
    for name in sorted((old.keys() | new.keys()) - set(PROGRAM)):
        one, other = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{name}.{inner}" for inner in differences(one, other)]
        elif digest(one) != digest(other):
            found.append(name)
    return found


def damaged(folder: Path, jobs: Iterable[tuple[str, int]], key: str, workers: int) -> dict[tuple[str, int], str]:
    """Finished shards whose files are not what was written, and what is wrong with each; their receipts are deleted.

    Args:
        folder: Of the data set.
        jobs: Split and number of the shards to read.
        key: Of the receipts that count.
        workers: Threads that read.
    """

    def check(job: tuple[str, int]) -> str | None:
        receipt: Shard | None = read_receipt(folder / job[0], job[1])
        return receipt.damage(folder / job[0]) if receipt is not None and receipt.made_from == key else None

    listed = list(jobs)
    with ThreadPoolExecutor(max(1, workers)) as pool:  # hashing releases the interpreter
        found = {job: wrong for job, wrong in zip(listed, pool.map(check, listed), strict=True) if wrong}
    for split, number in found:
        (folder / split / f"shard-{number:05d}.json").unlink()
    return found


def _manifest(folder: Path) -> Manifest | None:
    """The manifest of a split; none where there is none or a damaged one, which the receipts make anew."""
    try:
        return read_manifest(folder)
    except DataError:
        return None


def _number(receipt: Path) -> int:
    digits = receipt.stem.removeprefix("shard-")
    return int(digits) if digits.isdigit() else -1
