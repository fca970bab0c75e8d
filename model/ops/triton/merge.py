"""`W' = W + scale * (A B)ᵀ`: many matrices, or flat pieces of matrices, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.triton.common import TRITON_DTYPE, block, dot, round_to

TILE = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}
"""Default tile: 16 KB of W in flight per block, since reading and writing W is all the cost."""


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
            acc = dot(b_tile, tl.trans(a_tile), acc)
        tl.store(out + (flat - lo), round_to(tile.to(tl.float32) + acc * scale, DTYPE), mask=mask)


def merge(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    starts: Sequence[int] | None = None,
    **tile: Any,
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
    tile = TILE | {"BLOCK_R": block(r, 32)} | tile
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
        DTYPE=TRITON_DTYPE[dtype],
        ALIGNED=aligned,
        **tile,
    )
