"""`z_g = scale * x A_g`: from d_in to r with each sample's own A, for up to three projections at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.rows import Segments
from model.ops.triton.common import MAX_GROUP, block, dot, round_to, rows_contiguous, same_strides, three

TILE = {"BLOCK_T": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}
"""Default tile. Three accumulators [64, 64] leave registers for three blocks per multiprocessor on sm_80; four stages
of 16 KB keep enough loads in flight to be bound by memory."""


@triton.jit
def _shrink_step(acc, x_tile, a_tiles, mask, EVEN: tl.constexpr):
    """One K block of one projection: load its A tile and multiply the shared x tile by it."""
    if EVEN:
        a_tile = tl.load(a_tiles)
    else:
        a_tile = tl.load(a_tiles, mask=mask, other=0.0)
    return dot(x_tile, a_tile, acc)


@triton.jit
def shrink_kernel(
    x,
    a0,
    a1,
    a2,
    z,
    offsets,
    sample,
    scale,
    d_in,
    r,
    x_row,
    a_sample,
    a_row,
    z_group,
    G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`z[g, t] = scale * x[t] A_g[sample of t]`. Grid: (tiles of r, tiles of the longest segment, segments).

    x is read once for all projections of the group. A tile of tokens lies in one segment, so one A serves all its rows;
    shorter segments leave the surplus tiles of the grid without work. EVEN: d_in and r are multiples of their blocks.
    """
    segment = tl.program_id(2)
    end = tl.load(offsets + segment + 1)
    t0 = tl.load(offsets + segment) + tl.program_id(1) * BLOCK_T
    if t0 < end:
        s = tl.load(sample + segment)
        rows = t0 + tl.arange(0, BLOCK_T)
        cols = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        ks = tl.arange(0, BLOCK_K)
        in_rows = (rows < end)[:, None]
        in_cols = (cols < r)[None, :]
        x_tiles = x + rows.to(tl.int64)[:, None] * x_row + ks[None, :]
        # A segment without a sample takes no step and stores zeros.
        depth = tl.where(s >= 0, d_in, 0)
        a_offset = tl.maximum(s, 0).to(tl.int64) * a_sample + ks[:, None] * a_row + cols[None, :]
        acc0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        acc1 = acc0
        acc2 = acc0
        for k in range(0, depth, BLOCK_K):
            in_k = (k + ks) < d_in
            mask = in_k[:, None] & in_cols
            # The row mask is constant along the contiguous axis and keeps 16-byte loads; a mask over k would not, hence
            # EVEN. `tl.where` on the row index instead would hide from the compiler that a row is contiguous.
            if EVEN:
                x_tile = tl.load(x_tiles, mask=in_rows, other=0.0)
            else:
                x_tile = tl.load(x_tiles, mask=in_rows & in_k[None, :], other=0.0)
            acc0 = _shrink_step(acc0, x_tile, a0 + a_offset, mask, EVEN)
            if G > 1:
                acc1 = _shrink_step(acc1, x_tile, a1 + a_offset, mask, EVEN)
            if G > 2:
                acc2 = _shrink_step(acc2, x_tile, a2 + a_offset, mask, EVEN)
            x_tiles += BLOCK_K
            a_offset += BLOCK_K * a_row
        # The scale is applied in fp32, before the one rounding.
        out = z + rows.to(tl.int64)[:, None] * r + cols[None, :]
        mask = in_rows & in_cols
        tl.store(out, round_to(acc0 * scale, z.dtype.element_ty), mask=mask)
        if G > 1:
            tl.store(out + z_group, round_to(acc1 * scale, z.dtype.element_ty), mask=mask)
        if G > 2:
            tl.store(out + 2 * z_group, round_to(acc2 * scale, z.dtype.element_ty), mask=mask)


def shrink(x: Tensor, a: Sequence[Tensor], scale: float, segments: Segments, **tile: Any) -> Tensor:
    """`z_g = scale * x A_g` [G, T, r] in the dtype of x; zero for tokens without a sample.

    x [T, d_in]; a: G of [S, d_in, r]; `tile` overrides block sizes, `num_warps` and `num_stages`.
    """
    x, a = rows_contiguous(x), same_strides(a)
    (tokens, d_in), r = x.shape, a[0].shape[2]
    z = torch.empty(len(a), tokens, r, dtype=x.dtype, device=x.device)
    tile = TILE | {"BLOCK_R": block(r, 64)} | tile
    for g in range(0, len(a), MAX_GROUP):
        part = a[g : g + MAX_GROUP]
        grid = (triton.cdiv(r, tile["BLOCK_R"]), triton.cdiv(segments.max_len, tile["BLOCK_T"]), len(segments.sample))
        if 0 not in grid:
            shrink_kernel[grid](
                x,
                *three(part),
                z[g:],
                segments.offsets,
                segments.sample,
                scale,
                d_in,
                r,
                x.stride(0),
                *part[0].stride()[:2],
                z.stride(0),
                G=len(part),
                EVEN=d_in % tile["BLOCK_K"] == 0 and r % tile["BLOCK_R"] == 0,
                **tile,
            )
    return z
