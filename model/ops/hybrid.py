"""The CUDA backends: Triton for the thin products; the base GEMM by cuBLAS (``hybrid``) or by Triton (``fused``).

Hybrid writes the low-rank product first and lets cuBLAS read it as the matrix it accumulates into (beta = 1), under
the shadow of the big GEMM: no separate addition, no second output. ``addmm_`` in place, because the out-of-place form
copies the accumulator first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops import triton_kernels, tuner
from model.ops.rows import Segments


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    segments: Segments,
    fused: bool = False,
) -> list[Tensor]:
    """Outputs ``y_g`` [T, d_out_g] and, last, ``z`` [G, T, r] (see ``lowrank.py``)."""
    z = triton_kernels.shrink(x, a, scale, segments)
    outputs = []
    for g, b_g in enumerate(b):
        bias = biases[g] if biases else None
        tile = tuner.tile_for(x, *weights[g].shape, b_g.shape[0]) if fused and weights else None
        if tile is not None:
            outputs.append(triton_kernels.gemm_lowrank(x, weights[g], z[g], b_g, bias=bias, **tile))
            continue
        y = torch.mm(z[g], b_g) if bias is None else torch.addmm(bias, z[g], b_g)
        outputs.append(y.addmm_(x, weights[g].t()) if weights else y)
    return [*outputs, z]


def backward(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    z: Tensor,
    scale: float,
    segments: Segments,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    fused: bool = False,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients ``dx`` [T, d_in], ``da`` [G, S, d_in, r] and ``db`` per projection (see ``lowrank.py``)."""
    dx = da = None
    if need_dx or need_da:
        dz = torch.empty_like(z)
        for dz_g, dy_g, b_g in zip(dz, dy, b, strict=True):
            torch.addmm(dz_g, dy_g, b_g.t(), beta=0, alpha=scale, out=dz_g)
        if need_dx:
            dx = _dx(dy, x, weights, a, dz, segments, fused)
        if need_da:
            da = triton_kernels.factor_grad(x, dz, segments)
    db = [torch.mm(z_g.t(), dy_g) for z_g, dy_g in zip(z, dy, strict=True)] if need_db else []
    return dx, da, db


def _dx(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    dz: Tensor,
    segments: Segments,
    fused: bool,
) -> Tensor:
    tiles = []
    if fused and weights:
        tiles = [tuner.tile_for(dy_g, *w.t().shape, dz.shape[2]) for dy_g, w in zip(dy, weights, strict=True)]
    if tiles and all(tile is not None for tile in tiles):
        dx = None
        for dy_g, w, dz_g, a_g, tile in zip(dy, weights, dz, a, tiles, strict=True):
            low = a_g.transpose(1, 2)
            dx = triton_kernels.gemm_lowrank(dy_g, w.t(), dz_g, low, segments, add_to=dx, **tile)
        return dx
    dx = triton_kernels.expand(dz[: triton_kernels.MAX_GROUP], a[: triton_kernels.MAX_GROUP], segments)
    for g in range(triton_kernels.MAX_GROUP, len(a), triton_kernels.MAX_GROUP):
        stop = g + triton_kernels.MAX_GROUP
        dx += triton_kernels.expand(dz[g:stop], a[g:stop], segments)
    for dy_g, w in zip(dy, weights, strict=True) if weights else ():
        dx.addmm_(dy_g, w)
    return dx
