"""Times on a device: CUDA events on a GPU, the clock on a CPU; medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Row = dict[str, Any]


def timed(run: Callable[[], object], device: torch.device, seconds: float = 0.5, least: int = 3) -> Row:
    """Milliseconds of `run` after two warm-up calls, repeated for about `seconds` and at least `least` times.

    Returns:
        `ms` (median), `ms_min`, `ms_max`, `n`.
    """
    for _ in range(2):
        run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or (time.perf_counter() < end and len(taken) < 200):
        taken.append(once(run, device))
    return {"ms": median(taken), "ms_min": min(taken), "ms_max": max(taken), "n": len(taken)}


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, from an idle device to the end of its last kernel."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def roof(device: torch.device, dtype: torch.dtype, tiny: bool) -> Row:
    """What this device reaches at best, measured now: `copy_bytes_per_s` (read + written), `matmul_flops_per_s`."""
    source = torch.empty(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 128 if tiny else 8192
    left, right = torch.randn(2, n, n, device=device).to(dtype)
    copied = timed(lambda: target.copy_(source), device, 0.2)["ms"]
    multiplied = timed(lambda: torch.mm(left, right), device, 0.2)["ms"]
    return {
        "copy_bytes_per_s": 2 * source.numel() / (1e-3 * copied),
        "matmul_flops_per_s": 2 * n**3 / (1e-3 * multiplied),
    }
