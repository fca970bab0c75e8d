"""Triton kernels of the low-rank ops and their launchers.

Layouts: x [T, d_in], a_g [S, d_in, r], z [G, T, r], all with contiguous rows; segments as `rows.Segments`. Products
accumulate in fp32 and are rounded once. Up to three projections share a launch, so that x is read once for q, k and v.

Triton's interpreter (3.6 to 3.9) multiplies the raw bits of bf16 in `tl.dot` and truncates when it converts fp32 to
bf16; `_dot` and `_round` do both properly there and compile to the plain instruction on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.rows import Segments

MAX_GROUP = 3
"""Projections in one launch: q, k and v."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, acc):
    """`acc + left @ right` in fp32, without TF32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _round(value, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _shrink_step(acc, x_tile, a_tiles, mask, EVEN: tl.constexpr):
    if EVEN:
        a_tile = tl.load(a_tiles)
    else:
        a_tile = tl.load(a_tiles, mask=mask, other=0.0)
    return _dot(x_tile, a_tile, acc)


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
    """`z[g, t] = scale * x[t] A_g[sample of t]`. Grid: (tiles of r, tiles of the longest segment, segments)."""
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
        out = z + rows.to(tl.int64)[:, None] * r + cols[None, :]
        mask = in_rows & in_cols
        tl.store(out, _round(acc0 * scale, z.dtype.element_ty), mask=mask)
        if G > 1:
            tl.store(out + z_group, _round(acc1 * scale, z.dtype.element_ty), mask=mask)
        if G > 2:
            tl.store(out + 2 * z_group, _round(acc2 * scale, z.dtype.element_ty), mask=mask)


@triton.jit
def _expand_step(acc, z_tiles, a_tiles, r, in_rows, in_ks, BLOCK_R: tl.constexpr, EVEN: tl.constexpr):
    rs = tl.arange(0, BLOCK_R)
    for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
        if EVEN:
            z_tile = tl.load(z_tiles, mask=in_rows, other=0.0)
            a_tile = tl.load(a_tiles)
        else:
            in_r = ((r0 + rs) < r)[None, :]
            z_tile = tl.load(z_tiles, mask=in_rows & in_r, other=0.0)
            a_tile = tl.load(a_tiles, mask=in_ks & in_r, other=0.0)
        acc = _dot(z_tile, tl.trans(a_tile), acc)
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
    """`dx[t] = Σ_g dz[g, t] A_gᵀ`, written once. Grid: (tiles of d_in, tiles of the longest segment, segments)."""
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
        depth = tl.where(s >= 0, r, 0)
        z_tiles = dz + rows.to(tl.int64)[:, None] * r + rs[None, :]
        a_offset = tl.maximum(s, 0).to(tl.int64) * a_sample + ks[:, None] * a_row + rs[None, :]
        acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        acc = _expand_step(acc, z_tiles, a0 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        if G > 1:
            acc = _expand_step(acc, z_tiles + z_group, a1 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        if G > 2:
            acc = _expand_step(acc, z_tiles + 2 * z_group, a2 + a_offset, depth, in_rows, in_ks, BLOCK_R, EVEN)
        out = dx + rows.to(tl.int64)[:, None] * d_in + ks[None, :]
        tl.store(out, _round(acc, dx.dtype.element_ty), mask=in_rows & (ks < d_in)[None, :])


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
    """`da[g, s] = Σ x[t]ᵀ dz[g, t]` over the segments of sample s. Grid: (tiles of r, tiles of d_in, samples)."""
    s = tl.program_id(2)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ts = tl.arange(0, BLOCK_T)
    in_ks = (ks < d_in)[None, :]
    in_cols = (cols < r)[None, :]
    acc0 = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc1 = acc0
    acc2 = acc0
    for i in range(tl.load(first + s), tl.load(first + s + 1)):
        segment = tl.load(order + i)
        end = tl.load(offsets + segment + 1)
        for t0 in range(tl.load(offsets + segment), end, BLOCK_T):
            rows = (t0 + ts).to(tl.int64)[:, None]
            in_rows = ((t0 + ts) < end)[:, None]
            x_mask = in_rows
            z_mask = in_rows
            if not EVEN:
                x_mask = in_rows & in_ks
                z_mask = in_rows & in_cols
            x_tile = tl.trans(tl.load(x + rows * x_row + ks[None, :], mask=x_mask, other=0.0))
            z_tiles = dz + rows * r + cols[None, :]
            acc0 = _dot(x_tile, tl.load(z_tiles, mask=z_mask, other=0.0), acc0)
            if G > 1:
                acc1 = _dot(x_tile, tl.load(z_tiles + z_group, mask=z_mask, other=0.0), acc1)
            if G > 2:
                acc2 = _dot(x_tile, tl.load(z_tiles + 2 * z_group, mask=z_mask, other=0.0), acc2)
    out = da + s.to(tl.int64) * d_in * r + ks[:, None] * r + cols[None, :]
    mask = (ks < d_in)[:, None] & in_cols
    tl.store(out, _round(acc0, da.dtype.element_ty), mask=mask)
    if G > 1:
        tl.store(out + da_group, _round(acc1, da.dtype.element_ty), mask=mask)
    if G > 2:
        tl.store(out + 2 * da_group, _round(acc2, da.dtype.element_ty), mask=mask)


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

    z_tiles = z + safe_rows[:, None] * r + rs[None, :]
    low_tiles = low + rs[:, None] * low_r + cols[None, :] * low_n
    if PER_SAMPLE:
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
                acc = _dot(z_tile, low_tile, acc)
    else:
        for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
            if EVEN:
                z_tile = tl.load(z_tiles + r0)
                low_tile = tl.load(low_tiles + r0 * low_r)
            else:
                in_r = (r0 + rs) < r
                z_tile = tl.load(z_tiles + r0, mask=in_r[None, :], other=0.0)
                low_tile = tl.load(low_tiles + r0 * low_r, mask=in_r[:, None] & in_cols, other=0.0)
            acc = _dot(z_tile, low_tile, acc)

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
        acc = _dot(x_tile, w_tile, acc)
        x_tiles += BLOCK_K
        w_tiles += BLOCK_K * w_k

    mask = in_rows[:, None] & in_cols
    out = y + rows.to(tl.int64)[:, None] * n + cols[None, :]
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, _round(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(
    source,
    target,
    a,
    b,
    width,
    start,
    end,
    scale,
    r,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`W' = W + scale * (A B)ᵀ` for P matrices of any shapes in one launch. Grid: (tiles of the largest, P).

    source, target, a, b: int64 [P] addresses; a is [d_in, r], b is passed transposed as [d_out, r], both contiguous.
    width: int64 [P], d_in. start, end: int64 [P], the flat range of W that source and target hold. ALIGNED: all
    addresses are multiples of 16 bytes; d_in, start and end multiples of 8 elements.
    """
    p = tl.program_id(1)
    d_in = tl.load(width + p)
    lo = tl.load(start + p)
    hi = tl.load(end + p)
    w = tl.load(source + p).to(tl.pointer_type(DTYPE))
    out = tl.load(target + p).to(tl.pointer_type(DTYPE))
    a_p = tl.load(a + p).to(tl.pointer_type(DTYPE))
    b_p = tl.load(b + p).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # Loaded integers carry no divisibility; without it every access is one element wide.
        d_in = tl.multiple_of(d_in, 8)
        lo = tl.multiple_of(lo, 8)
        w = tl.multiple_of(w, 16)
        out = tl.multiple_of(out, 16)
        a_p = tl.multiple_of(a_p, 16)
        b_p = tl.multiple_of(b_p, 16)
    tiles_k = tl.cdiv(d_in, BLOCK_K)
    n0 = lo // d_in + tl.program_id(0) // tiles_k * BLOCK_N
    if n0 * d_in < hi:
        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
        rs = tl.arange(0, BLOCK_R)
        flat = n[:, None] * d_in + k[None, :]
        mask = (k < d_in)[None, :] & (flat >= lo) & (flat < hi)
        if ALIGNED:
            # lo, hi and d_in are multiples of 8, so the mask is constant over 8 neighbours and 16-byte accesses hold.
            mask = tl.max_constancy(mask, [1, 8])
        tile = tl.load(w + (flat - lo), mask=mask, other=0.0)  # first, to be in flight while the product is formed
        in_n = (n * d_in < hi)[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for r0 in tl.range(0, r, BLOCK_R, num_stages=1):
            in_r = ((r0 + rs) < r)[None, :]
            b_tile = tl.load(b_p + n[:, None] * r + (r0 + rs)[None, :], mask=in_n & in_r, other=0.0)
            a_tile = tl.load(a_p + k[:, None] * r + (r0 + rs)[None, :], mask=(k < d_in)[:, None] & in_r, other=0.0)
            acc = _dot(b_tile, tl.trans(a_tile), acc)
        tl.store(out + (flat - lo), _round(tile.to(tl.float32) + acc * scale, DTYPE), mask=mask)


def shrink(x: Tensor, a: Sequence[Tensor], scale: float, segments: Segments, **tile) -> Tensor:
    """`z_g = scale * x A_g` [G, T, r] in the dtype of x; zero for tokens without a sample.

    x [T, d_in]; a: G of [S, d_in, r]; `tile` overrides block sizes, `num_warps` and `num_stages`.
    """
    x, a = _rows_contiguous(x), _same_strides(a)
    (tokens, d_in), r = x.shape, a[0].shape[2]
    z = torch.empty(len(a), tokens, r, dtype=x.dtype, device=x.device)
    tile = {"BLOCK_T": 64, "BLOCK_R": _block(r, 64), "BLOCK_K": 32, "num_warps": 4, "num_stages": 4} | tile
    for g in range(0, len(a), MAX_GROUP):
        part = a[g : g + MAX_GROUP]
        grid = (triton.cdiv(r, tile["BLOCK_R"]), triton.cdiv(segments.max_len, tile["BLOCK_T"]), len(segments.sample))
        if 0 not in grid:
            shrink_kernel[grid](
                x,
                *_three(part),
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


def expand(dz: Tensor, a: Sequence[Tensor], segments: Segments, **tile) -> Tensor:
    """`Σ_g dz_g A_gᵀ` [T, d_in]: the low-rank part of dx. dz [G, T, r] contiguous; a: at most 3 of [S, d_in, r]."""
    a = _same_strides(a)
    (_, tokens, r), d_in = dz.shape, a[0].shape[1]
    dx = torch.empty(tokens, d_in, dtype=dz.dtype, device=dz.device)
    tile = {"BLOCK_T": 64, "BLOCK_K": 128, "BLOCK_R": _block(r, 64), "num_warps": 4, "num_stages": 2} | tile
    grid = (triton.cdiv(d_in, tile["BLOCK_K"]), triton.cdiv(segments.max_len, tile["BLOCK_T"]), len(segments.sample))
    if 0 not in grid:
        expand_kernel[grid](
            dz,
            *_three(a),
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


def factor_grad(x: Tensor, dz: Tensor, segments: Segments, **tile) -> Tensor:
    """`dA_g = x_sᵀ dz_g` [G, S, d_in, r] for every sample, exactly zero for samples without tokens.

    x [T, d_in]; dz [G, T, r] contiguous.
    """
    x = _rows_contiguous(x)
    (groups, _, r), d_in, samples = dz.shape, x.shape[1], len(segments.first) - 1
    da = torch.empty(groups, samples, d_in, r, dtype=x.dtype, device=x.device)
    tile = {"BLOCK_K": 64, "BLOCK_R": _block(r, 64), "BLOCK_T": 32, "num_warps": 4, "num_stages": 3} | tile
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


def gemm_lowrank(
    x: Tensor,
    w: Tensor,
    z: Tensor,
    low: Tensor,
    segments: Segments | None = None,
    *,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
    **tile,
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
    x = _rows_contiguous(x)
    (tokens, d), n, r = x.shape, w.shape[0], z.shape[1]
    y = torch.empty(tokens, n, dtype=x.dtype, device=x.device) if add_to is None else add_to
    tile = {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 32,
        "BLOCK_R": _block(r, 32),
        "GROUP_M": 8,
        "num_warps": 4,
        "num_stages": 4,
    } | tile
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
            token_segment(segments, tokens) if per_sample else x,
            segments.sample if per_sample else x,
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


def merge(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    starts: Sequence[int] | None = None,
    **tile,
) -> None:
    """Write `W + scale * (A B)ᵀ` of every source to its target, P matrices or pieces of matrices in one launch.

    Args:
        sources: P weights [d_out, d_in], or flat pieces [n] with `starts`; contiguous, all of one dtype.
        targets: As `sources`; may be the same tensors.
        a: P of [d_in, r].
        b: P of [r, d_out].
        scale: Alpha / r.
        starts: Flat index of each piece's first element.
        tile: Overrides block sizes, `num_warps` and `num_stages`.
    """
    if not sources:
        return
    device, dtype, r = sources[0].device, sources[0].dtype, a[0].shape[1]
    a = [a_p.to(dtype).contiguous() for a_p in a]
    b_t = [b_p.t().to(dtype).contiguous() for b_p in b]
    starts = [0] * len(sources) if starts is None else list(starts)
    ends = [lo + w.numel() for lo, w in zip(starts, sources, strict=True)]
    widths = [a_p.shape[0] for a_p in a]
    tile = {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": _block(r, 32), "num_warps": 8, "num_stages": 2} | tile
    tiles = max(
        triton.cdiv(triton.cdiv(hi, d_in) - lo // d_in, tile["BLOCK_N"]) * triton.cdiv(d_in, tile["BLOCK_K"])
        for lo, hi, d_in in zip(starts, ends, widths, strict=True)
    )
    aligned = all(v % 8 == 0 for v in (*starts, *ends, *widths)) and all(
        t.is_meta or t.data_ptr() % 16 == 0 for t in (*sources, *targets, *a, *b_t)
    )

    def table(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    def addresses(tensors: Sequence[Tensor]) -> Tensor:
        return table([0 if t.is_meta else t.data_ptr() for t in tensors])

    merge_kernel[(tiles, len(sources))](
        addresses(sources),
        addresses(targets),
        addresses(a),
        addresses(b_t),
        table(widths),
        table(starts),
        table(ends),
        scale,
        r,
        DTYPE=_TRITON_DTYPE[dtype],
        ALIGNED=aligned,
        **tile,
    )


_TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _block(size: int, largest: int) -> int:
    """Block for a dimension of `size`: a power of two from 16, the least that tensor cores take."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _same_strides(a: Sequence[Tensor]) -> list[Tensor]:
    """The factors, copied only if their strides differ or a row is not contiguous."""
    if a[0].stride(2) == 1 and len({a_g.stride() for a_g in a}) == 1:
        return list(a)
    return [a_g.contiguous() for a_g in a]


def _three(a: Sequence[Tensor]) -> list[Tensor]:
    """Three pointer arguments; those beyond the group are never read."""
    return [*a, *[a[0]] * (MAX_GROUP - len(a))]
