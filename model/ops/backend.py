"""Which implementation runs the ops: chosen once, by name."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "reference", "cpu", "hybrid", "fused")

_chosen = "auto"


def set_backend(name: str, device: torch.device | None = None) -> str | None:
    """Choose the backend of all low-rank ops of this process.

    `auto`: `hybrid` for CUDA tensors where Triton is installed, else `cpu`. `reference`: plain differentiable
    torch. `cpu`: plain torch, accumulating in place (it runs on CUDA too). `hybrid`: Triton around cuBLAS.
    `fused`: Triton base GEMM where the tuner has measured it fast enough, else as `hybrid`.

    Args:
        name: One of `BACKENDS`.
        device: Where the ops are going to run, to find out now whether they can.

    Returns:
        The backend that runs on `device`, never `auto`; None without a device.

    Raises:
        ValueError: unknown name, or a Triton backend where Triton cannot run.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"ops.backend={name}: choose one of {', '.join(BACKENDS)}")
    if name in ("hybrid", "fused") and device is not None:
        if not triton_installed():
            raise ValueError(f"ops.backend={name} needs Triton, which is not installed; set ops.backend=auto")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"ops.backend={name} needs a CUDA device, but this runs on {device}; set ops.backend=auto")
    _chosen = name
    return None if device is None else backend_for(device)


def backend_for(device: torch.device) -> str:
    """The backend that runs tensors on `device` (never `auto`)."""
    if _chosen == "auto":
        return "hybrid" if device.type == "cuda" and triton_installed() else "cpu"
    return _chosen


def triton_installed() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None
