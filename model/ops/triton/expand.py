"""`dx = Σ_g dz_g A_gᵀ`: from r back to d_in with each sample's own A, the low-rank part of the gradient of x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.rows import Segments
from model.ops.triton.common import block, dot, round_to, same_strides, three

TILE = {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
"""Default tile: r fits one block, so there is nothing to pipeline; the wide output tile amortises the read of z."""


@triton.jit
def _expand_step(acc, z_tiles, a_tiles, r, in_rows, in_ks, BLOCK_R: tl.constexpr, EVEN: tl.constexpr):
    """`acc + z A_gᵀ` of one projection."""
    rs = tl.arange(0, BLOCK_R)
    # At most a few steps: pipelining them would cost registers and shared memory and hide nothing.
    for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
        if EVEN:
            z_tile = tl.load(z_tiles, mask=in_rows, other=0.0)
            a_tile = tl.load(a_tiles)
        else:
            in_r = ((r0 + rs) < r)[None, :]
            z_tile = tl.load(z_tiles, mask=in_rows & in_r, other=0.0)
            a_tile = tl.load(a_tiles, mask=in_ks & in_r, other=0.0)
        acc = dot(z_tile, tl.trans(a_tile), acc)
        z_tiles += BLOCK_R
        a_tiles += BLOCK_R
    return acc


@triton.jit
def expand_kernel(
    dz,
    a0,
    a1,
    a2,
    dx,
    offsets,
    sample,
    d_in,
    r,
    z_group,
    a_sample,
    a_row,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`dx[t] = Σ_g dz[g, t] A_gᵀ`, written once. Grid: (tiles of d_in, tiles of the longest segment, segments).

    One accumulator sums over the group, so dx is written once, not once per projection and added.
    """
    segment = tl.program_id(2)
    end = tl.load(offsets + segment + 1)
    t0 = tl.load(offsets + segment) + tl.program_id(1) * BLOCK_T
    if t0 < end:
        s = tl.load(sample + segment)
        rows = t0 + tl.arange(0, BLOCK_T)
        ks = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        rs = tl.arange(0, BLOCK_R)
        in_rows = (rows < end)[:, None]
        in_ks = (ks < d_in)[:, None]
        # A segment without a sample takes no step and stores zeros.
        depth = tl.where(s >= 0, r, 0)
        z_tiles = dz + rows.to(tl.int64)[:, None] * r + rs[None, :]
        # A tiles are read as they lie, [BLOCK_K, BLOCK_R] with r contiguous, and transposed in registers.
        a_offset = tl.maximum(s, 0).to(tl.int64) * a_sample + ks[:, None] * a_row + rs[None, :]
        acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        acc = _expand_step(acc, z_tiles, a0 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        if G > 1:
            acc = _expand_step(acc, z_tiles + z_group, a1 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        if G > 2:
            acc = _expand_step(acc, z_tiles + 2 * z_group, a2 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        out = dx + rows.to(tl.int64)[:, None] * d_in + ks[None, :]
        tl.store(out, round_to(acc, dx.dtype.element_ty), mask=in_rows & (ks < d_in)[None, :])


def expand(dz: Tensor, a: Sequence[Tensor], segments: Segments, **tile: Any) -> Tensor:
    """`Σ_g dz_g A_gᵀ` [T, d_in]: the low-rank part of dx. dz [G, T, r] contiguous; a: at most 3 of [S, d_in, r]."""
    a = same_strides(a)
    (_, tokens, r), d_in = dz.shape, a[0].shape[1]
    dx = torch.empty(tokens, d_in, dtype=dz.dtype, device=dz.device)
    tile = TILE | {"BLOCK_R": block(r, 64)} | tile
    grid = (triton.cdiv(d_in, tile["BLOCK_K"]), triton.cdiv(segments.max_len, tile["BLOCK_T"]), len(segments.sample))
    if 0 not in grid:
        expand_kernel[grid](
            dz,
            *three(a),
            dx,
            segments.offsets,
            segments.sample,
            d_in,
            r,
            dz.stride(0),
            *a[0].stride()[:2],
            G=len(a),
            EVEN=d_in % tile["BLOCK_K"] == 0 and r % tile["BLOCK_R"] == 0,
            **tile,
        )
    return dx
