"""Says when a run comes apart: its loss has risen far above where it was."""

from __future__ import annotations

from collections import deque
from typing import Any

from train.engine.records import warn

_WINDOW = 10
"""Steps that a mean is over."""


class RisingLoss:
    """Observer of the loop that warns when the mean loss of the last ten steps lies far above the lowest such mean.

    Gradient norms do not tell: many runs that learned well had steps of thirty times the usual norm, which clipping
    takes care of (docs/learning.md). It warns once per rise, and forgets what came before a resumption.

    Args:
        limit: Of the rise, in nats per target (`tracking.max_loss_rise`).
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._lowest, self._lowest_step, self._warned = float("inf"), 0, False

    def __call__(self, step: int, record: dict[str, Any]) -> None:
        """Look at the record of a step."""
        self._last.append(record["loss"])
        if len(self._last) < _WINDOW:
            return
        mean = sum(self._last) / _WINDOW
        if mean < self._lowest:
            self._lowest, self._lowest_step = mean, step
        rising = not mean <= self._lowest + self.limit  # a loss that is no number has risen too
        if rising and not self._warned:
            warn(
                f"step {step}: the loss of the last {_WINDOW} steps is {mean:.2f}, and was {self._lowest:.2f} at step "
                f"{self._lowest_step} (tracking.max_loss_rise={self.limit:g}); the run may be coming apart. Lower "
                "optim.lr (output_factors first), or warm up longer"
            )
        self._warned = rising
