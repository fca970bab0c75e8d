"""`dA_g = x_sᵀ dz_g`: the gradient of each sample's A, summed over the tokens of that sample."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.rows import Segments
from model.ops.triton.common import MAX_GROUP, block, dot, round_to, rows_contiguous

TILE = {"BLOCK_K": 64, "BLOCK_T": 64, "num_warps": 4, "num_stages": 2}
"""Default tile: the loop runs over tokens, often only 64 of a sample. No Triton from 3.5 on spills a register."""


@triton.jit
def factor_grad_kernel(
    x,
    dz,
    da,
    offsets,
    order,
    first,
    d_in,
    r,
    x_row,
    z_group,
    da_group,
    G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`da[g, s] = Σ x[t]ᵀ dz[g, t]` over the segments of sample s. Grid: (tiles of r, tiles of d_in, samples).

    One program owns one output tile and walks all tokens of its sample, so there are no atomics: the result is the same
    in every run, and a sample without tokens stores zeros.
    """
    s = tl.program_id(2)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ts = tl.arange(0, BLOCK_T)
    in_ks = (ks < d_in)[None, :]
    in_cols = (cols < r)[None, :]
    acc0 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc1 = acc0
    acc2 = acc0
    # `order[first[s] : first[s + 1]]` are the segments of sample s.
    for i in range(tl.load(first + s), tl.load(first + s + 1)):
        segment = tl.load(order + i)
        end = tl.load(offsets + segment + 1)
        for t0 in range(tl.load(offsets + segment), end, BLOCK_T):
            rows = (t0 + ts).to(tl.int64)[:, None]
            in_rows = ((t0 + ts) < end)[:, None]
            # The row mask alone keeps 16-byte loads; masks along the contiguous axis are taken only when needed.
            x_mask = in_rows
            z_mask = in_rows
            if not EVEN:
                x_mask = in_rows & in_ks
                z_mask = in_rows & in_cols
            x_tile = tl.trans(tl.load(x + rows * x_row + ks[None, :], mask=x_mask, other=0.0))
            z_tiles = dz + rows * r + cols[None, :]
            acc0 = dot(x_tile, tl.load(z_tiles, mask=z_mask, other=0.0), acc0)
            if G > 1:
                acc1 = dot(x_tile, tl.load(z_tiles + z_group, mask=z_mask, other=0.0), acc1)
            if G > 2:
                acc2 = dot(x_tile, tl.load(z_tiles + 2 * z_group, mask=z_mask, other=0.0), acc2)
    out = da + s.to(tl.int64) * d_in * r + ks[:, None] * r + cols[None, :]
    mask = (ks < d_in)[:, None] & in_cols
    tl.store(out, round_to(acc0, da.dtype.element_ty), mask=mask)
    if G > 1:
        tl.store(out + da_group, round_to(acc1, da.dtype.element_ty), mask=mask)
    if G > 2:
        tl.store(out + 2 * da_group, round_to(acc2, da.dtype.element_ty), mask=mask)


def factor_grad(x: Tensor, dz: Tensor, segments: Segments, **tile: Any) -> Tensor:
    """`dA_g = x_sᵀ dz_g` [G, S, d_in, r] for every sample, exactly zero for samples without tokens.

    x [T, d_in]; dz [G, T, r] contiguous.
    """
    x = rows_contiguous(x)
    (groups, _, r), d_in, samples = dz.shape, x.shape[1], len(segments.first) - 1
    da = torch.empty(groups, samples, d_in, r, dtype=x.dtype, device=x.device)
    tile = TILE | {"BLOCK_R": block(r, 64)} | tile
    grid = (triton.cdiv(r, tile["BLOCK_R"]), triton.cdiv(d_in, tile["BLOCK_K"]), samples)
    for g in range(0, groups if samples else 0, MAX_GROUP):
        factor_grad_kernel[grid](
            x,
            dz[g:],
            da[g:],
            segments.offsets,
            segments.order,
            segments.first,
            d_in,
            r,
            x.stride(0),
            dz.stride(0),
            da.stride(0),
            G=min(MAX_GROUP, groups - g),
            EVEN=d_in % tile["BLOCK_K"] == 0 and r % tile["BLOCK_R"] == 0,
            **tile,
        )
    return da
