"""Which rank holds up the others: with its data, or with its arithmetic.

Under ZeRO-3 all ranks take the same time for a step, since each waits for the slowest in every layer. So what is
compared is what a rank does alone: getting its batch, and a multiplication of fixed size.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch

from train.process import distributed

FACTOR = 1.5
"""A rank is slow that takes so many times the median's time,"""
SHARE = 0.05
"""and, for data, where that is so much of a step more,"""
TIMES = 3
"""so many times in a row."""
_SIZE = {"cuda": 4096, "cpu": 256}


@dataclass
class Stragglers:
    """Compares the ranks whenever a record with system figures is due.

    Attributes:
        device: Of this rank.
    """

    device: torch.device

    def __post_init__(self) -> None:
        self._data, self._seconds, self._steps = 0.0, 0.0, 0
        self._row: dict[str, tuple[int, int]] = {}  # rank, and how many times in a row
        self._told: set[tuple[str, int]] = set()

    def step(self, data: float, seconds: float) -> None:
        """Note what a step took this rank: waiting for its batch, and in all; in seconds."""
        self._data, self._seconds, self._steps = self._data + data, self._seconds + seconds, self._steps + 1

    def compare(self) -> tuple[dict[str, Any], list[str]]:
        """Figures for the record, and what to tell the user. Collective.

        `slowest/data_rank` and `slowest/data_s` (seconds a step since the last call), `slowest/compute_rank` and
        `slowest/compute_ratio` (over the median); nothing with one rank.
        """
        if distributed.world_size() == 1:
            return {}, []
        steps = max(1, self._steps)
        own = (socket.gethostname(), self._data / steps, probe(self.device), self._seconds / steps)
        hosts, data, compute, seconds = zip(*distributed.gather(own), strict=True)
        self._data, self._seconds, self._steps = 0.0, 0.0, 0
        told = []
        late, slow = data.index(max(data)), compute.index(max(compute))
        usual, normal = median_low(data), median_low(compute)
        if self._persists("data", late, data[late] > max(FACTOR * usual, usual + SHARE * max(seconds))):
            told.append(
                f"rank {late} ({hosts[late]}) holds up the others: it waits {data[late]:.3f} s a step for its data, "
                f"the median rank {usual:.3f} s; raise data.num_workers, or look at that host's disk"
            )
        ratio = compute[slow] / normal
        if self._persists("compute", slow, ratio > FACTOR):
            told.append(
                f"rank {slow} ({hosts[slow]}) holds up the others: its arithmetic takes {ratio:.1f} times as long as "
                "the median rank's; look for other processes, heat or a lowered clock on that host"
            )
        figures = {
            "slowest/data_rank": late,
            "slowest/data_s": data[late],
            "slowest/compute_rank": slow,
            "slowest/compute_ratio": ratio,
        }
        return figures, told

    def _persists(self, kind: str, rank: int, slow: bool) -> bool:
        """Whether this rank has been the slow one often enough to say so, which is done once."""
        before, times = self._row.get(kind, (rank, 0))
        times = 0 if not slow else times + 1 if before == rank else 1
        self._row[kind] = (rank, times)
        if times < TIMES or (kind, rank) in self._told:
            return False
        self._told.add((kind, rank))
        return True


def probe(device: torch.device) -> float:
    """Seconds of one multiplication of a fixed size on this rank alone: about a millisecond."""
    size = _SIZE.get(device.type, 256)
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    found = []
    for _ in range(3):  # the first may have to wait for what the device still does
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)
