"""The op where no gradient is wanted. A decoded token is so small that every operator and check has a price of its own:
the factors A of projections that share their input stand side by side, once per set of weights, and there is no
custom op around plain products. The same formulas as `model.ops.op`; sums may be rounded in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.ops.backend import backend_for
from model.ops.rows import NO_SAMPLE, Rows, Segments

_FEW = 64
"""Tokens up to which the thin products of a model in half precision are taken in fp32 on a CPU. For one token oneDNN's
product of bf16 vectors costs 12 to 20 us, most of it before it begins, and the one in fp32 1.4 to 5 us (AMD EPYC)."""


class Joined(NamedTuple):
    """The factors of G projections that share their input.

    Attributes:
        a: [R, d_in, G * r], those of each text row, zero for a row without an image; [1, ...]: the same for all rows.
        b: G of [r, d_out_g].
        scale: Alpha / r.
        dtype: Of the model. On a CPU, the factors of one in half precision are fp32 (see `_FEW`).
    """

    a: Tensor
    b: tuple[Tensor, ...]
    scale: float
    dtype: torch.dtype

    def fits(self, x: Tensor) -> bool:
        """Whether x [R, L, d_in] is of these rows; if not, `model.ops.lowrank` knows what to do or what is wrong."""
        if x.dim() != 3 or x.dtype != self.dtype or self.a.shape[0] not in (1, x.shape[0]):
            return False
        return x.dtype == self.a.dtype or x.shape[0] * x.shape[1] <= _FEW


def join(a: Sequence[Tensor], b: Sequence[Tensor], scale: float, rows: Rows | Segments | None) -> Joined | None:
    """Lay out the factors of projections that share their input.

    Args:
        a: G of [S, d_in, r].
        b: G of [r, d_out_g].
        scale: Alpha / r.
        rows: As for `model.ops.lowrank.lowrank_linear`.

    Returns:
        None where another op is to run: packed rows, and backends other than `cpu`.
    """
    if (
        backend_for(a[0].device) != "cpu"
        or isinstance(rows, Segments)
        or (rows is not None and rows.offsets is not None)
    ):
        return None
    with torch.no_grad():
        joined = a[0] if len(a) == 1 else torch.cat(tuple(a), dim=2)
        if rows is not None:
            joined = _by_row(joined, rows.sample)
        dtype = joined.dtype
        wide = torch.promote_types(dtype, torch.float32) if joined.device.type == "cpu" else dtype
        return Joined(joined.to(wide).detach(), tuple(each.to(wide).detach() for each in b), scale, dtype)


def _by_row(a: Tensor, sample: tuple[int, ...]) -> Tensor:
    """[S, ...] -> [R, ...], or [1, ...] where all rows have the same sample."""
    if len(set(sample)) == 1 and sample[0] != NO_SAMPLE:
        return a[sample[0] : sample[0] + 1]
    if sample == tuple(range(len(a))):
        return a
    index = torch.tensor(sample, device=a.device)
    return a[index.clamp_min(0)] * (index != NO_SAMPLE).to(a.dtype)[:, None, None]


def lowrank_linear_group(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], joined: Joined
) -> tuple[Tensor, ...]:
    """`x W_gᵀ + bias_g + scale * (x A_g) B_g`, G outputs [R, L, d_out_g], for x [R, L, d_in] that `joined.fits`."""
    outputs = tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    for y, z, b in zip(outputs, _shrunk(x, joined), joined.b, strict=True):
        tokens = y.view(-1, b.shape[1])
        if y.dtype == b.dtype:
            tokens.addmm_(z, b, alpha=joined.scale)
        else:
            tokens.add_(z @ b, alpha=joined.scale)
    return outputs


def with_delta(y: Tensor, x: Tensor, joined: Joined) -> Tensor:
    """`y + scale * (x A) B` for y [R, L, d_out] that something else made of x [R, L, d_in] that `joined.fits`.

    In place: y is nobody else's, and not x.
    """
    (z,), (b,) = _shrunk(x, joined), joined.b
    delta = (z @ b).view(y.shape)
    return y.add_(delta, alpha=joined.scale)


def _shrunk(x: Tensor, joined: Joined) -> tuple[Tensor, ...]:
    """x A_g, G of [R * L, r]."""
    a = joined.a
    x = x.to(a.dtype)
    z = x.flatten(0, 1) @ a[0] if a.shape[0] == 1 else torch.bmm(x, a).flatten(0, 1)
    return z.split(joined.b[0].shape[0], 1) if len(joined.b) > 1 else (z,)
