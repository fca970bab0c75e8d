"""Which implementation runs the ops, and which the merge: chosen once per process, by name."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from model.config import BACKENDS, MERGES
from model.ops.cuda import build

_chosen = "auto"
_chosen_merge = "auto"


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
        _check_triton(f"ops.backend={name}", device)
    _chosen = name
    return None if device is None else backend_for(device)


def backend_for(device: torch.device) -> str:
    """The backend that runs tensors on `device` (never `auto`)."""
    if _chosen == "auto":
        return "hybrid" if device.type == "cuda" and triton_installed() else "cpu"
    return _chosen


def set_merge(name: str, device: torch.device | None = None) -> str | None:
    """Choose what merges weights in this process.

    `auto`: for CUDA tensors the CUDA kernel where it has been built (bf16), else Triton's where that is installed;
    elsewhere torch. `cuda`: the CUDA kernel, built now if need be. `triton`, `torch`: as named.

    Args:
        name: One of `MERGES`.
        device: Where merges are going to run, to find out now whether they can.

    Returns:
        What merges bf16 weights on `device`, never `auto`; None without a device.

    Raises:
        ValueError: unknown name, or one that cannot run on `device`.
        UserError: the CUDA kernel cannot be built.
    """
    global _chosen_merge
    if name not in MERGES:
        raise ValueError(f"ops.merge={name}: choose one of {', '.join(MERGES)}")
    if name == "triton" and device is not None:
        _check_triton(f"ops.merge={name}", device)
    if name == "cuda" and device is not None:
        if device.type != "cuda":
            raise ValueError(f"ops.merge=cuda needs a CUDA device, but this runs on {device}; set ops.merge=auto")
        build.load(device.index or 0)
    _chosen_merge = name
    return None if device is None else merge_for(device, torch.bfloat16)


def merge_for(device: torch.device, dtype: torch.dtype) -> str:
    """What merges weights of `dtype` on `device` (never `auto`)."""
    if _chosen_merge != "auto":
        return _chosen_merge
    if device.type != "cuda" or dtype == torch.float64:
        return "torch"
    if dtype == torch.bfloat16 and build.find(torch.cuda.get_device_capability(device)) is not None:
        return "cuda"
    return "triton" if triton_installed() else "torch"


def _check_triton(setting: str, device: torch.device) -> None:
    key = setting.partition("=")[0]
    if not triton_installed():
        raise ValueError(f"{setting} needs Triton, which is not installed; set {key}=auto")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{setting} needs a CUDA device, but this runs on {device}; set {key}=auto")


def triton_installed() -> bool:
    """Whether the Triton kernels can be imported."""
    return find_spec("triton") is not None
