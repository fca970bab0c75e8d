"""Divides the training split of any source into training, validation and test, by image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.store.errors import DataError
from data_prep.store.sample import Count, Dropped, Sample

PARTS = ("val", "test")


def check_fractions(val: float, test: float) -> None:
    """Raise a `DataError` that names the fraction that cannot be."""
    for name, value in (("val_fraction", val), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise DataError(f"{name}={value}: a share, at least 0 and below 1")
    if val + test >= 1:
        raise DataError(f"val_fraction={val} and test_fraction={test} leave nothing to train on")


@dataclass
class Divided:
    """A source whose splits `train` and `..._train` give up a share of their samples to `val` and `test`.

    The image decides, by its sha256: all samples of an image, whatever their id, are on one side, and the same ones
    wherever and in whatever order they are read. (A sample of several images goes where its first does, a text-only one
    by its id.)

    Attributes:
        source: What is divided.
        val, test: Shares of the samples.
    """

    source: Any
    val: float = 0.0
    test: float = 0.0

    def made_from(self) -> dict[str, Any]:
        """That of the source, and the shares."""
        return {**self.source.made_from(), "val_fraction": self.val, "test_fraction": self.test}

    def plan(self) -> dict[str, list[Any]]:
        """Units `[split of the source, its units]`; a small split reads many of them into one shard.

        Raises:
            DataError: the source has such splits of its own, or nothing to divide.
        """
        plan = self.source.plan()
        planned: dict[str, list[Any]] = {}
        for split, units in plan.items():
            planned[split] = [[split, [unit]] for unit in units]
            prefix = split.removesuffix("train")
            if prefix == split:
                continue
            for part, share in zip(PARTS, (self.val, self.test), strict=True):
                if share and prefix + part in plan:
                    raise DataError(f"{part}_fraction={share}: the source has a split {prefix + part} of its own")
                if share:
                    step = max(1, round(1 / share))
                    planned[prefix + part] = [[split, units[at : at + step]] for at in range(0, len(units), step)]
        if not any(split.endswith("train") for split in plan):
            raise DataError(f"val_fraction and test_fraction divide a split train; there are {', '.join(plan)}")
        return planned

    def read(self, split: str, unit: list[Any]) -> Iterator[Sample | Dropped | Count]:
        """The samples of a unit that belong to `split`; defects and counts once, with those of training."""
        origin, units = unit
        divided = origin.endswith("train")
        part = split.removeprefix(origin.removesuffix("train")) if divided else "train"
        for each in units:
            for item in self.source.read(origin, each):
                if isinstance(item, Sample) and divided:
                    if self.part_of(item) == part:
                        yield item
                elif part == "train":
                    yield item

    def part_of(self, sample: Sample) -> str:
        """`train`, `val` or `test`."""
        data = sample.images[0] if sample.images else sample.id.encode(errors="surrogatepass")
        place = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
        return "test" if place < self.test else "val" if place < self.test + self.val else "train"
