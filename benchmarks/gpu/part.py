"""What a part of the run is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.models import Size, size
from benchmarks.gpu.results import Results


@dataclass(frozen=True)
class Context:
    """Where a part runs and where its rows go.

    Attributes:
        name: Of the part.
        device: One GPU, or the CPU.
        tiny: The least that runs every line, instead of the paper's shapes.
        results: The file.
    """

    name: str
    device: torch.device
    tiny: bool
    results: Results

    @property
    def size(self) -> Size:
        """The shapes to run."""
        return size(self.tiny)

    @property
    def dtype(self) -> torch.dtype:
        """bf16, or fp32 where it is only about running the code."""
        return torch.float32 if self.tiny else torch.bfloat16

    def row(self, name: str, values: dict[str, Any]) -> None:
        """Add a row of results; it is on disk when this returns."""
        self.results.row(self.name, name, values)
