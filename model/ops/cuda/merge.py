"""Calls the C ABI of the CUDA merge (`merge.cu`): the tensors' addresses in, one launch per 64 matrices."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from model.ops.cuda import build

MAX_MATRICES = 64
"""Of one launch: their addresses travel by value in its argument block (`kMaxMatrices`)."""


def merge(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    starts: Sequence[int] | None = None,
    *,
    library: ctypes.CDLL | None = None,
) -> None:
    """Write `W + scale * (A B)ᵀ` of every source to its target: fp32 sums, one rounding to bf16.

    Args:
        sources: bf16 weights [d_out, d_in], or flat pieces [n] with `starts`; contiguous, on one device.
        targets: As `sources`.
        a: [d_in, r] each, one r for all.
        b: [r, d_out] each.
        scale: Alpha / r.
        starts: Flat index of each piece's first element.
        library: Default: `build.load` for the sources' GPU.

    Raises:
        ValueError: weights that are not bf16.
        UserError: there is no library and none can be built.
        RuntimeError: the launch failed; the code is a `cudaError_t`.
    """
    if any(w.dtype != torch.bfloat16 for w in sources):
        raise ValueError(f"the CUDA merge is for bf16 weights, these are {sources[0].dtype}; set ops.merge=auto")
    starts = [0] * len(sources) if starts is None else list(starts)
    ends = [start + w.numel() for start, w in zip(starts, sources, strict=True)]
    a = [a_p.bfloat16().contiguous() for a_p in a]
    b_t = [b_p.t().bfloat16().contiguous() for b_p in b]
    for i in range(0, len(sources), MAX_MATRICES):
        part = slice(i, i + MAX_MATRICES)
        _launch(sources[part], targets[part], a[part], b_t[part], starts[part], ends[part], scale, library)


def _launch(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    a: Sequence[Tensor],
    b_t: Sequence[Tensor],
    starts: Sequence[int],
    ends: Sequence[int],
    scale: float,
    library: ctypes.CDLL | None,
) -> None:
    count, r, device = len(sources), a[0].shape[1], sources[0].device
    on_gpu = device.type == "cuda"
    library = library or build.load(torch.device(device).index or 0)
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else None

    def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
        return (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))

    # The library has a CUDA runtime of its own, which is told the device; torch's is put back by the context.
    with torch.cuda.device(device) if on_gpu else nullcontext():
        code = library.vlora_merge_bf16(
            pointers(sources),
            pointers(targets),
            pointers(a),
            pointers(b_t),
            (ctypes.c_int64 * count)(*starts),
            (ctypes.c_int64 * count)(*ends),
            (ctypes.c_int * count)(*(a_p.shape[0] for a_p in a)),
            count,
            r,
            ctypes.c_float(scale),
            device.index or 0,
            ctypes.c_void_p(stream),
        )
    if code != 0:
        raise RuntimeError(f"vlora_merge_bf16 returned {code} for {count} matrices of rank {r}")
