"""Made-up pairs of tiny pictures and captions, any number of them: to measure a machine before the real data are there.

Deterministic: sample `n` depends on the seed and `n` alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from common.settings import setting
from data_prep.store.sample import Sample
from data_prep.text.dialogues import exchange

_WORDS = ("a", "the", "red", "blue", "small", "large", "round", "old", "dog", "house", "tree", "street", "on", "of")


@dataclass
class Synthetic:
    """The source.

    Attributes:
        samples: How many.
        samples_per_shard: Of them in a unit of work.
        side: Of the pictures, in pixels.
        words: Captions have 4 to this many words.
        seed: Chooses pictures and captions.
    """

    samples: int = setting(1_000_000, within="[1, 1e10]")
    samples_per_shard: int = setting(10_000, within="[1, 1e7]")
    side: int = setting(16, within="[1, 8192]")
    words: int = setting(40, within="[4, 10000]")
    seed: int = setting(0, within="[0, 4294967295]")

    def made_from(self) -> dict[str, Any]:
        """The settings."""
        return {"source": "synthetic", **asdict(self)}

    def plan(self) -> dict[str, list[list[int]]]:
        """Units `[first, end]`."""
        step = self.samples_per_shard
        return {"train": [[start, min(start + step, self.samples)] for start in range(0, self.samples, step)]}

    def read(self, split: str, unit: list[int]) -> Iterator[Sample]:
        """Samples of a range of numbers."""
        for number in range(*unit):
            noise = hashlib.shake_128(f"{self.seed}/{number}".encode()).digest(49 + self.words)
            picture = Image.frombytes("RGB", (4, 4), noise[:48]).resize(
                (self.side, self.side), Image.Resampling.NEAREST
            )
            stream = io.BytesIO()
            picture.save(stream, "jpeg")
            length = 4 + noise[48] % (self.words - 3)
            caption = " ".join(_WORDS[value % len(_WORDS)] for value in noise[49 : 49 + length])
            yield Sample(f"synthetic/{number}", [stream.getvalue()], [exchange("", caption)], "synthetic")
