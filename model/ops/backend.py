"""Which implementation runs the ops: chosen once, logged once."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "hybrid", "fused")

_chosen = "auto"
_logged: set[tuple[str, str]] = set()


def set_backend(name: str) -> None:
    """Choose the backend of all low-rank ops of this process.

    ``auto``: ``cpu`` for CPU tensors, ``hybrid`` for CUDA tensors where Triton is installed, else ``cpu`` (plain torch
    runs on CUDA too). ``reference``: plain differentiable torch. ``cpu``: plain torch, accumulating in place.
    ``hybrid``: Triton around cuBLAS. ``fused``: Triton base GEMM where the tuner has measured it fast enough, else as
    ``hybrid``.

    Raises:
        ValueError: unknown name.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"unknown ops backend {name!r}; choose one of {', '.join(BACKENDS)}")
    _chosen = name


def backend_for(device: torch.device) -> str:
    """The backend that runs tensors on ``device`` (never ``auto``)."""
    name = _chosen
    if name == "auto":
        name = "hybrid" if device.type == "cuda" and triton_installed() else "cpu"
    if (name, device.type) not in _logged:
        _logged.add((name, device.type))
        log.info("low-rank ops: backend %s on %s (asked for %s)", name, device.type, _chosen)
    return name


def triton_installed() -> bool:
    """Whether the Triton kernels can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
