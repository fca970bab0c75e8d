"""The CUDA backends: Triton for the thin products; the base GEMM by cuBLAS (`hybrid`) or by Triton (`fused`).

Hybrid writes the low-rank product first and lets cuBLAS read it as the matrix it accumulates into (beta = 1), under
the shadow of the big GEMM: no separate addition, no second output. `addmm_` in place, because the out-of-place form
copies the accumulator first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.ops import tuner
from model.ops.backend import backend_for
from model.ops.rows import Segments
from model.ops.triton.common import MAX_GROUP
from model.ops.triton.expand import expand
from model.ops.triton.factor_grad import factor_grad
from model.ops.triton.gemm import gemm_lowrank
from model.ops.triton.shrink import shrink

__all__ = ["factor_grad", "input_grad", "project", "shrink"]


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`x Wᵀ + bias + z B` [T, d_out]; without a weight only `z B`."""
    if weight is None:
        return torch.mm(z, b)
    if (tile := _fused_tile(x, weight, z.shape[1])) is not None:
        return gemm_lowrank(x, weight, z, b, bias=bias, **tile)
    y = torch.mm(z, b) if bias is None else torch.addmm(bias, z, b)
    return y.addmm_(x, weight.t())


def input_grad(
    dy: Sequence[Tensor], weights: Sequence[Tensor], dz: Tensor, a: Sequence[Tensor], segments: Segments
) -> Tensor:
    """`dx = Σ_g dy_g W_g + dz_g A_gᵀ` [T, d_in], accumulated in one buffer; `weights` may be empty."""
    found = (_fused_tile(dy_g, w.t(), dz.shape[2]) for dy_g, w in zip(dy, weights, strict=False))
    tiles = [tile for tile in found if tile is not None]
    if tiles and len(tiles) == len(weights):
        dx = None
        for dy_g, w, dz_g, a_g, tile in zip(dy, weights, dz, a, tiles, strict=True):
            low = a_g.transpose(1, 2)
            dx = gemm_lowrank(dy_g, w.t(), dz_g, low, segments, add_to=dx, **tile)
        return dx
    dx = expand(dz[:MAX_GROUP], a[:MAX_GROUP], segments)
    for g in range(MAX_GROUP, len(a), MAX_GROUP):
        dx += expand(dz[g : g + MAX_GROUP], a[g : g + MAX_GROUP], segments)
    for dy_g, w in zip(dy, weights, strict=False):
        dx.addmm_(dy_g, w)
    return dx


def _fused_tile(x: Tensor, weight: Tensor, r: int) -> dict[str, Any] | None:
    """The tile of the fused GEMM for `weight` [n, d] where it was chosen and measured to pay, else None: cuBLAS."""
    n, d = weight.shape
    return tuner.tile_for(x, n, d, r) if backend_for(x.device) == "fused" else None
