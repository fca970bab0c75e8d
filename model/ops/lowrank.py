"""The op this project is about: `y = x Wᵀ + bias + s · (x A_b) B`, with an A for every sample of the batch.

The public functions are `lowrank_linear`, `lowrank_linear_group` and `lowrank_delta`. They check their arguments and
call the custom op (`model.ops.op`: formulas, gradients, what is saved), except for the `reference` backend, which is
plain differentiable torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.ops import reference
from model.ops.backend import backend_for
from model.ops.op import lowrank_linear_op
from model.ops.rows import Rows, Segments, as_segments


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    rows: Rows | Segments | Tensor | None = None,
) -> Tensor:
    """A linear layer plus the low-rank update of each token's sample: `x Wᵀ + bias + scale * (x A_s) B`.

    Args:
        x: [R, L, d_in] padded rows, or [T, d_in] packed tokens.
        weight: [d_out, d_in]. Pass the Parameter itself: it is what is saved for backward (ZeRO-3 needs that).
        a: [S, d_in, r], one factor per sample.
        b: [r, d_out], shared by all samples.
        scale: Alpha / r.
        bias: [d_out] or None.
        rows: The sample of each row (`Rows.padded` or an int [R] tensor) or of each segment (`Rows.packed`); -1 for
            a row without an image, which gets the plain linear layer exactly. None: row i is sample i, and a single
            sample serves every row. Build `Rows` once per batch: a tensor is read on the host at every call.

    Returns:
        [..., d_out] in the dtype of `x` (of autocast, where that is on).

    Raises:
        ValueError: shapes, dtypes or rows do not fit together.
    """
    biases = () if bias is None else (bias,)
    return lowrank_linear_group(x, (weight,), (a,), (b,), scale, biases=biases, rows=rows)[0]


def lowrank_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    *,
    biases: Sequence[Tensor] = (),
    rows: Rows | Segments | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`lowrank_linear` for G projections that share x (q, k, v; gate, up): one shrink, one dx.

    The projections may differ in d_out (grouped-query attention) but not in d_in or r.

    Args:
        x: [R, L, d_in] or [T, d_in].
        weights: G of [d_out_g, d_in].
        a: G of [S, d_in, r].
        b: G of [r, d_out_g].
        scale: Alpha / r.
        biases: G of [d_out_g], or empty.
        rows: As for `lowrank_linear`.

    Returns:
        G outputs [..., d_out_g].

    Raises:
        ValueError: shapes, dtypes or rows do not fit together.
    """
    return _apply(x, list(weights), list(biases), list(a), list(b), scale, rows)


def lowrank_delta(
    x: Tensor, a: Tensor, b: Tensor, scale: float, *, rows: Rows | Segments | Tensor | None = None
) -> Tensor:
    """Only the low-rank term, `scale * (x A_s) B`: for the `m` type, parallel to the whole MLP.

    Arguments, result and errors as for `lowrank_linear`; rows without an image are zero.
    """
    return _apply(x, [], [], [a], [b], scale, rows)[0]


def _apply(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    rows: Rows | Segments | Tensor | None,
) -> tuple[Tensor, ...]:
    _check(x, weights, biases, a, b)
    lead, tokens = x.shape[:-1], x.reshape(-1, x.shape[-1])
    segments = as_segments(rows, a[0].shape[0], lead, x.device)
    if backend_for(x.device) == "reference":
        outputs = reference.lowrank_linear_group(tokens, weights, biases, a, b, scale, segments)
    else:
        *outputs, _ = lowrank_linear_op(
            tokens, weights, biases, a, b, segments.tensors(), segments.per_sample, segments.max_len, float(scale)
        )
    return tuple(y.view(*lead, y.shape[-1]) for y in outputs)


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor], a: list[Tensor], b: list[Tensor]) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [R, L, d_in] or [T, d_in], got {tuple(x.shape)}")
    if not a or len(a) != len(b) or len(weights) not in (0, len(a)) or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"a group needs as many a as b, weights and biases; "
            f"got {len(a)} a, {len(b)} b, {len(weights)} weights, {len(biases)} biases"
        )
    d_in = x.shape[-1]
    for g, (a_g, b_g) in enumerate(zip(a, b, strict=True)):
        if a_g.dim() != 3 or a_g.shape != (a[0].shape[0], d_in, a[0].shape[2]):
            raise ValueError(f"a must be [S, {d_in}, r] with one S and r for the group, got {tuple(a_g.shape)}")
        if b_g.dim() != 2 or b_g.shape[0] != a_g.shape[2]:
            raise ValueError(f"b must be [{a_g.shape[2]}, d_out], got {tuple(b_g.shape)}")
        if weights and weights[g].shape != (b_g.shape[1], d_in):
            raise ValueError(f"weight must be {(b_g.shape[1], d_in)} to fit b and x, got {tuple(weights[g].shape)}")
        if biases and biases[g].shape != (b_g.shape[1],):
            raise ValueError(f"bias must be {(b_g.shape[1],)}, got {tuple(biases[g].shape)}")
    device = x.device.type
    # `is_autocast_available`, which knows every device, cannot be traced by torch 2.9's compiler.
    if device == "meta" or not torch.is_autocast_enabled(device):
        dtypes = {t.dtype for t in (x, *weights, *biases, *a, *b)}
        if len(dtypes) != 1:
            raise ValueError(
                f"x, weights, a and b must have one dtype outside autocast, got {sorted(map(str, dtypes))}"
            )
