"""Which samples make up a step, and which micro-batch of which rank each of them goes to.

What a step holds does not depend on the number of ranks; only the last cut, `deal`, does. With `group_by` other than
`none` the samples of a *window* of steps change places, so that a step holds samples of similar length; what a window
holds stays the same, and windows end where epochs do, so an epoch still shows what it showed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train.data.order import Draws, MixtureOrder, Permutation

Sizes = Callable[[Draws], tuple[np.ndarray, np.ndarray]]
"""Images [n] and length [n] (any unit) of drawn samples."""


class Batching:
    """Cuts an order into steps.

    Args:
        order: The order.
        batch_size: Samples of a step.
        group_by: `none`: as the order has them; `length`: steps of samples of similar length; `length_modality`:
            the same, with samples with and without images grouped apart and every step holding its share of both.
        window: Steps whose samples are grouped together.
        sizes: What to group by.
        seed: Chooses the order of the steps in a window.
    """

    def __init__(
        self, order: MixtureOrder, batch_size: int, group_by: str, window: int, sizes: Sizes, seed: int
    ) -> None:
        self.order, self.batch_size, self.group_by, self.window = order, batch_size, group_by, window
        self.sizes, self.seed = sizes, seed
        self._latest: tuple[int, list[Draws]] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_latest": None}

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs, to the nearest."""
        return round(epochs * self.order.epoch_size / self.batch_size)

    def step(self, number: int) -> Draws:
        """Samples of a step, in an order that `deal` knows."""
        if self.group_by == "none":
            return self.order(number * self.batch_size, self.batch_size)
        first, last = self._window_of(number)
        if self._latest is None or self._latest[0] != first:
            self._latest = first, self._grouped(first, last - first)
        return self._latest[1][number - first]

    def deal(self, draws: Draws, rank: int, world_size: int, accumulation: int) -> list[Draws]:
        """A rank's part of a step, cut into micro-batches.

        Grouped samples stand sorted: each micro-step takes the next of them, and its ranks take turns. So the ranks'
        totals of a micro-step (of length, and under `length_modality` of images) differ by less than one sample's,
        and no rank waits for another's long rows or many images.
        """
        micro = len(draws.sample) // (world_size * accumulation)
        if self.group_by == "none":
            starts = [(rank * accumulation + number) * micro for number in range(accumulation)]
            return [draws.take(slice(start, start + micro)) for start in starts]
        wide = micro * world_size
        return [draws.take(slice(n * wide + rank, (n + 1) * wide, world_size)) for n in range(accumulation)]

    def _window_of(self, step: int) -> tuple[int, int]:
        """First step of the window that holds `step`, and the one after its last."""
        epoch = step * self.batch_size // self.order.epoch_size
        while self.steps(epoch) > step:
            epoch -= 1
        while self.steps(epoch + 1) <= step:
            epoch += 1
        start = self.steps(epoch)
        first = start + (step - start) // self.window * self.window
        return first, min(first + self.window, self.steps(epoch + 1))

    def _grouped(self, first: int, steps: int) -> list[Draws]:
        size = self.batch_size
        draws = self.order(first * size, steps * size)
        images, length = self.sizes(draws)
        ranked = np.argsort(-length, kind="stable")
        if self.group_by == "length":
            batches = list(ranked.reshape(steps, size))
        else:
            seeing, blind = ranked[images[ranked] > 0], ranked[images[ranked] == 0]
            ends = np.arange(steps + 1) * len(seeing) // steps
            rest = np.arange(steps + 1) * size - ends
            batches = [
                np.concatenate([seeing[ends[n] : ends[n + 1]], blind[rest[n] : rest[n + 1]]]) for n in range(steps)
            ]
            batches = [batch[np.lexsort((-length[batch], -images[batch]))] for batch in batches]
        shuffled = Permutation(steps, self.seed, 6, first)(np.arange(steps))
        return [draws.take(batches[number]) for number in shuffled]


def deal_by_tokens(tokens: np.ndarray, images: np.ndarray, world_size: int, budget: int) -> list[list[np.ndarray]]:
    """Micro-batches of a step that are bounded by tokens in place of samples.

    All ranks get the same number of micro-batches, as few as fit: a function of the whole step, which every rank works
    out alike. Longest sample first, each goes to the emptiest micro-batch; those with images only where there are not
    yet as many as an even share, so that no rank's encoder has more to do than that.

    Args:
        tokens: [n], of the samples of a step.
        images: [n], of the same.
        world_size: Ranks.
        budget: Tokens of a micro-batch at most; more only where one sample has more.

    Returns:
        Per micro-step, fullest first, per rank: which samples, ascending.
    """
    limit = max(budget, int(tokens.max(initial=0)))
    steps = max(1, -(-int(tokens.sum()) // (world_size * budget)))
    while True:
        bins: list[list[int]] = [[] for _ in range(world_size * steps)]
        loads, seeing = np.zeros(len(bins), np.int64), np.zeros(len(bins), np.int64)
        share = -(-int((images > 0).sum()) // len(bins))
        for sample in np.argsort(-tokens, kind="stable"):
            sees = images[sample] > 0
            number = int(np.argmin(np.where(seeing < share, loads, np.iinfo(np.int64).max) if sees else loads))
            bins[number].append(int(sample))
            loads[number] += tokens[sample]
            seeing[number] += sees
        if loads.max() <= limit:
            break
        steps += 1
    ranked = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    return [
        [np.sort(np.array(bins[number], np.int64)) for number in ranked[start : start + world_size]]
        for start in range(0, len(bins), world_size)
    ]
