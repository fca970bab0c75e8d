"""Readers, one per kind of data set. Each enumerates units of work and turns a unit into samples or named defects.

The interface is `data_prep.prepare.Source`; `conf/data_prep/source/NAME.yaml` names the reader (`kind`) and its
settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from data_prep.store.errors import Defect
from data_prep.store.sample import Count, Dropped, Sample

Record = TypeVar("Record")


def each(
    records: Iterable[tuple[str, Record]], make: Callable[[str, Record], Iterator[Sample | Count]]
) -> Iterator[Sample | Dropped | Count]:
    """What `make` yields for every (name, record); a record in which it finds a `Defect` ends as `Dropped`."""
    for name, record in records:
        try:
            yield from make(name, record)
        except Defect as defect:
            yield Dropped(name, defect.reason, defect.detail)
