"""Where a step's time goes: data, vision, connector, LLM forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from model.vlm import VisionLanguageModel


class StepTimer:
    """Adds up seconds per phase; `take` returns them and starts over.

    Vision and connector are timed by hooks inside the forward pass; `llm` is the rest of it. On a GPU phases show
    launch time: a synchronisation for the clock would cost overlap.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        for name in ("vision", "connector"):
            module = getattr(model, name)
            if module is not None:
                self._watch(module, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        out = dict(self._seconds)
        out["llm"] = out.pop("forward", 0.0) - out.get("vision", 0.0) - out.get("connector", 0.0)
        self._seconds.clear()
        return out

    def _watch(self, module: nn.Module, name: str) -> None:
        starts: list[float] = []

        def before(*_: object) -> None:
            starts.append(time.perf_counter())

        def after(*_: object) -> None:
            self._seconds[name] += time.perf_counter() - starts.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
