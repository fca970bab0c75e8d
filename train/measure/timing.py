"""Where a step's time goes: data, vision, connector, LLM forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model.vlm import VisionLanguageModel


class StepTimer:
    """Adds up seconds per phase; `take` returns them and starts over.

    Vision and connector are timed by hooks inside the forward pass; `llm` is the rest of it. On a GPU the clock is
    read after a synchronisation only while `precise` is set (it costs overlap), otherwise phases show launch time.
    """

    def __init__(self, model: VisionLanguageModel, device: torch.device, precise: bool = False) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._sync = precise and device.type == "cuda"
        for name in ("vision", "connector"):
            module = getattr(model, name)
            if module is not None:
                self._watch(module, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        out = dict(self._seconds)
        out["llm"] = out.pop("forward", 0.0) - out.get("vision", 0.0) - out.get("connector", 0.0)
        self._seconds.clear()
        return out

    def _now(self) -> float:
        if self._sync:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _watch(self, module: nn.Module, name: str) -> None:
        starts: list[float] = []

        def before(*_: object) -> None:
            starts.append(self._now())

        def after(*_: object) -> None:
            self._seconds[name] += self._now() - starts.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
