"""Readers, one per kind of data set. Each enumerates units of work and turns a unit into samples or named defects.

The interface is `data_prep.prepare.Source`; `conf/data_prep/source/NAME.yaml` names the reader (`kind`) and its
settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from data_prep.store.errors import DataError, Defect
from data_prep.store.sample import Count, Dropped, Sample

Record = TypeVar("Record")
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test",
}  # fmt: skip
"""Names of folders and files that are splits, and what the split is called here."""


def each(
    records: Iterable[tuple[str, Record]], make: Callable[[str, Record], Iterator[Sample | Count]]
) -> Iterator[Sample | Dropped | Count]:
    """What `make` yields for every (name, record); a record in which it finds a `Defect` ends as `Dropped`."""
    for name, record in records:
        try:
            yield from make(name, record)
        except Defect as defect:
            yield Dropped(name, defect.reason, defect.detail)


def below(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that was read from a file. Links that the user made are followed.

    Raises:
        DataError: it leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"{folder}: the name {name!r} leads out of this folder; prepare the data anew")
    return folder / path
