"""What the kernels share: exact products and rounding under the interpreter, and what their launchers need.

Triton's interpreter (3.5 to 3.9) multiplies the raw bits of bf16 in `tl.dot` and truncates when it converts fp32 to
bf16; `dot` and `round_to` do both properly there and compile to the plain instruction on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_GROUP = 3
"""Projections in one launch: q, k and v. A kernel spells its three accumulators out, since it cannot loop over them."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Fixed when Triton is imported (`TRITON_INTERPRET=1`): the branches below cost nothing in a compiled kernel."""

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def dot(left, right, acc):
    """`acc + left @ right` in fp32. "ieee": fp32 operands are not shortened to TF32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # bf16 is the upper half of fp32: add just under half a unit, one more if the last kept bit is odd, and cut.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


def block(size: int, largest: int) -> int:
    """Block for a dimension of `size`: a power of two from 16, the least that tensor cores take."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def rows_contiguous(t: Tensor) -> Tensor:
    """`t` itself if its last axis is contiguous, as the kernels address it, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def same_strides(a: Sequence[Tensor]) -> list[Tensor]:
    """The factors, copied only if their strides differ or a row is not contiguous.

    A launch passes one set of strides for all of them.
    """
    if a[0].stride(2) == 1 and len({a_g.stride() for a_g in a}) == 1:
        return list(a)
    return [a_g.contiguous() for a_g in a]


def three(a: Sequence[Tensor]) -> list[Tensor]:
    """Three pointer arguments; those beyond the group are never read."""
    return [*a, *[a[0]] * (MAX_GROUP - len(a))]
