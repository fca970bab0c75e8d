"""The global order of samples: a pure function of the seed, computed anywhere in the stream at no cost.

The training stream is endless. Its position p names one sample of one source, the same whatever the number of ranks or
workers, so that the loader's whole state is a position. Nothing is shuffled in memory: a permutation is evaluated, not
stored (30 million samples would otherwise cost every rank 240 MB, and numpy's shuffles may change between versions).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6


def mix(*values: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of integers: the splitmix64 finaliser chained over `values`, element by element.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        state = np.asarray(0, dtype=np.uint64)
        for value in values:
            state = (state ^ np.asarray(value, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
        return state


class Permutation:
    """A pseudo-random permutation of `range(size)`, evaluated per index.

    A Feistel network over the next even power of two, walked until the value falls inside the range (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        size: Of the range.
        key: Integers that choose the permutation.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [mix(*key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int | np.ndarray) -> np.ndarray:
        """Image of `index`: int64, of its shape."""
        values = np.array(index, dtype=np.uint64, ndmin=1)
        pending = np.ones(values.shape, dtype=bool)
        while pending.any():
            values[pending] = self._encrypt(values[pending])
            pending = values >= self.size
        return values.astype(np.int64).reshape(np.shape(index))

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix(right, key) & self._mask)
        return (left << self._half) | right


@dataclass(frozen=True)
class Draws:
    """Samples at stream positions, as arrays [n]: their source, their index in it, and which pass over it this is."""

    source: np.ndarray
    sample: np.ndarray
    epoch: np.ndarray

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.source.tolist(), self.sample.tolist(), self.epoch.tolist(), strict=True)

    def take(self, where: np.ndarray | slice) -> Draws:
        """Some of them."""
        return Draws(self.source[where], self.sample[where], self.epoch[where])


class MixtureOrder:
    """Endless order over weighted sources.

    One epoch of the mixture holds `round(weight * size)` samples of each source, interleaved at random: any stretch
    of it holds the sources in these proportions, but for the luck of the draw, and none runs out early. Each source
    is gone through pass by pass, every pass in another order, whatever its weight: with weight 0.5 two epochs show
    every sample once, with weight 2 one epoch shows every sample twice.

    Args:
        sizes: Samples of each source.
        weights: Passes over each source per epoch.
        seed: Chooses the order.

    Raises:
        ValueError: no source, an empty one, or a weight so small that nothing would be drawn.
    """

    def __init__(self, sizes: list[int], weights: list[float], seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.shares = [round(weight * size) for size, weight in zip(sizes, weights, strict=True)]
        if not sizes or min(self.shares) < 1:
            raise ValueError(
                f"sources of {sizes} samples with weights {weights} give {self.shares} per epoch; each must be above 0"
            )
        self.epoch_size = sum(self.shares)
        self._ends = np.cumsum(self.shares)

    def __call__(self, start: int, count: int) -> Draws:
        """Samples at positions `start` to `start + count`."""
        position = np.arange(start, start + count, dtype=np.int64)
        epoch, offset = np.divmod(position, self.epoch_size)
        for value in np.unique(epoch):
            here = epoch == value
            offset[here] = Permutation(self.epoch_size, self.seed, 1, int(value))(offset[here])
        source = np.searchsorted(self._ends, offset, side="right")
        starts = self._ends - self.shares
        # The how-manieth sample of its source this is since the beginning; it counts the source's own passes.
        nth = epoch * np.take(self.shares, source) + offset - starts[source]
        passes, sample = np.divmod(nth, np.take(self.sizes, source))
        for pair in set(zip(source.tolist(), passes.tolist(), strict=True)):
            here = (source == pair[0]) & (passes == pair[1])
            sample[here] = Permutation(self.sizes[pair[0]], self.seed, 2, *pair)(sample[here])
        return Draws(source, sample, passes)


def draw_dialogues(available: int, wanted: int | None, seed: int, source: int, sample: int, epoch: int) -> list[int]:
    """Which dialogues of a sample are used in one pass over its source, in ascending order.

    Every `ceil(available / wanted)` passes use all of them: a pass takes the next `wanted` of one fixed permutation
    of the sample's dialogues, going round.
    """
    if wanted is None or wanted >= available:
        return list(range(available))
    at = (np.arange(wanted) + epoch * wanted) % available
    return sorted(Permutation(available, seed, 3, source, sample)(at).tolist())
