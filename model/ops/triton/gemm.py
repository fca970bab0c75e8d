"""`y = x Wᵀ + bias + z L`: the base GEMM and the low-rank term in one kernel (the `fused` backend)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.rows import Segments
from model.ops.triton.common import block, dot, round_to, rows_contiguous

TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 4}
"""Default tile: two blocks per multiprocessor on sm_80 without a spill (benchmarks/kernel_resources.json)."""


@triton.jit
def gemm_lowrank_kernel(
    x,
    w,
    z,
    low,
    bias,
    y,
    token_segment,
    sample,
    tokens,
    n,
    d,
    r,
    x_row,
    w_n,
    w_k,
    low_sample,
    low_r,
    low_n,
    PER_SAMPLE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`y (+)= x W + bias + z L`: a GEMM whose inner dimension is extended by r. One-dimensional grid of output tiles.

    W is addressed by (w_n, w_k), so that W and Wᵀ both serve. L is shared [r, n] or, with PER_SAMPLE, that of each
    token's sample; a tile of tokens that spans several segments adds one product for each of them.
    """
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    # Tiles that share a stripe of W run together, for the L2 cache.
    per_stripe = GROUP_M * tl.cdiv(n, BLOCK_N)
    m_first = tile // per_stripe * GROUP_M
    m_count = tl.minimum(tiles_m - m_first, GROUP_M)
    m = m_first + tile % per_stripe % m_count
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % per_stripe // m_count * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    rs = tl.arange(0, BLOCK_R)
    in_rows = rows < tokens
    in_cols = (cols < n)[None, :]
    # Rows are not the contiguous axis: reading row 0 in place of a missing one needs no mask and costs no vector width.
    safe_rows = tl.where(in_rows, rows, 0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    # The low-rank product first, into the same accumulator: its loop is short and not pipelined, so it adds no shared
    # memory to the main loop below.
    z_tiles = z + safe_rows[:, None] * r + rs[None, :]
    low_tiles = low + rs[:, None] * low_r + cols[None, :] * low_n
    if PER_SAMPLE:
        # Rows of this tile may span samples: one product per segment, with the rows of the others masked to zero.
        segment_of = tl.load(token_segment + safe_rows)
        lowest = tl.load(token_segment + m * BLOCK_M)
        highest = tl.load(token_segment + tl.minimum(m * BLOCK_M + BLOCK_M, tokens) - 1)
        for segment in range(lowest, highest + 1):
            s = tl.load(sample + segment)
            mine = (segment_of == segment)[:, None]
            depth = tl.where(s >= 0, r, 0)
            sample_tiles = low_tiles + tl.maximum(s, 0).to(tl.int64) * low_sample
            for r0 in tl.range(0, depth, BLOCK_R, num_stages=1):
                if EVEN:
                    z_tile = tl.load(z_tiles + r0, mask=mine, other=0.0)
                    low_tile = tl.load(sample_tiles + r0 * low_r)
                else:
                    in_r = (r0 + rs) < r
                    z_tile = tl.load(z_tiles + r0, mask=mine & in_r[None, :], other=0.0)
                    low_tile = tl.load(sample_tiles + r0 * low_r, mask=in_r[:, None] & in_cols, other=0.0)
                acc = dot(z_tile, low_tile, acc)
    else:
        for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
            if EVEN:
                z_tile = tl.load(z_tiles + r0)
                low_tile = tl.load(low_tiles + r0 * low_r)
            else:
                in_r = (r0 + rs) < r
                z_tile = tl.load(z_tiles + r0, mask=in_r[None, :], other=0.0)
                low_tile = tl.load(low_tiles + r0 * low_r, mask=in_r[:, None] & in_cols, other=0.0)
            acc = dot(z_tile, low_tile, acc)

    # The base GEMM.
    x_tiles = x + safe_rows[:, None] * x_row + ks[None, :]
    w_tiles = w + ks[:, None] * w_k + cols[None, :].to(tl.int64) * w_n
    for k in range(0, d, BLOCK_K):
        if EVEN:
            x_tile = tl.load(x_tiles)
            w_tile = tl.load(w_tiles)
        else:
            in_k = (k + ks) < d
            x_tile = tl.load(x_tiles, mask=in_k[None, :], other=0.0)
            w_tile = tl.load(w_tiles, mask=in_k[:, None] & in_cols, other=0.0)
        acc = dot(x_tile, w_tile, acc)
        x_tiles += BLOCK_K
        w_tiles += BLOCK_K * w_k

    mask = in_rows[:, None] & in_cols
    out = y + rows.to(tl.int64)[:, None] * n + cols[None, :]
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, round_to(acc, y.dtype.element_ty), mask=mask)


def gemm_lowrank(
    x: Tensor,
    w: Tensor,
    z: Tensor,
    low: Tensor,
    segments: Segments | None = None,
    *,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
    **tile: Any,
) -> Tensor:
    """`x Wᵀ + bias + z L` [T, n] in one kernel.

    Args:
        x: [T, d].
        w: [n, d], any strides (a transposed weight for dx).
        z: [T, r] contiguous.
        low: [r, n], or [S, r, n] together with `segments`: each token's own.
        segments: The sample of each token; needed with a per-sample `low`.
        bias: [n] or None.
        add_to: [T, n] contiguous, accumulated into and returned.
        tile: Overrides block sizes, `GROUP_M`, `num_warps` and `num_stages`.
    """
    if low.dim() == 3 and segments is None:
        raise ValueError("a per-sample factor needs the segments that say whose it is")
    x = rows_contiguous(x)
    (tokens, d), n, r = x.shape, w.shape[0], z.shape[1]
    y = torch.empty(tokens, n, dtype=x.dtype, device=x.device) if add_to is None else add_to
    tile = TILE | {"BLOCK_R": block(r, 32)} | tile
    per_sample = low.dim() == 3
    low_strides = low.stride() if per_sample else (0, *low.stride())
    grid = (triton.cdiv(tokens, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"]),)
    if grid[0]:
        gemm_lowrank_kernel[grid](
            x,
            w,
            z,
            low,
            x if bias is None else bias,
            y,
            *((token_segment(segments, tokens), segments.sample) if segments is not None and per_sample else (x, x)),
            tokens,
            n,
            d,
            r,
            x.stride(0),
            *w.stride(),
            *low_strides,
            PER_SAMPLE=per_sample,
            BIAS=bias is not None,
            ADD=add_to is not None,
            EVEN=d % tile["BLOCK_K"] == 0 and n % tile["BLOCK_N"] == 0 and r % tile["BLOCK_R"] == 0,
            **tile,
        )
    return y


def token_segment(segments: Segments, tokens: int) -> Tensor:
    """int32 [T], the segment of each token."""
    offsets = segments.offsets
    index = torch.arange(len(segments.sample), dtype=torch.int32, device=offsets.device)
    return torch.repeat_interleave(index, (offsets[1:] - offsets[:-1]).long(), output_size=tokens)
