"""The low-rank update in plain torch: readable, differentiable by autograd, any device and dtype including float64.

Every other backend is tested against this one; it contains no hand-written gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.ops.rows import NO_SAMPLE, Segments


def lowrank_update(x: Tensor, a: Tensor, b: Tensor, scale: float, segments: Segments) -> Tensor:
    """`scale * (x A_s) B` for the sample s of each token.

    Args:
        x: [T, d_in].
        a: [S, d_in, r].
        b: [r, d_out].
        scale: Alpha / r.
        segments: The sample of each token.

    Returns:
        [T, d_out] in the dtype of `x`; tokens without a sample are zero. Half precision is accumulated in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    offsets = segments.offsets.tolist()
    parts = []
    for i, sample in enumerate(segments.sample.tolist()):
        tokens = x[offsets[i] : offsets[i + 1]]
        if sample == NO_SAMPLE:
            parts.append(tokens.new_zeros(tokens.shape[0], b.shape[1]))
        else:
            z = (scale * (tokens.to(wide) @ a[sample].to(wide))).to(x.dtype)
            parts.append((z.to(wide) @ b.to(wide)).to(x.dtype))
    return torch.cat(parts) if parts else x.new_zeros(0, b.shape[1])


def lowrank_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    segments: Segments,
) -> list[Tensor]:
    """`x W_gᵀ + bias_g + scale * (x A_g) B_g` for every projection g of a group that shares `x` [T, d_in].

    `weights` may be empty: then only the low-rank term. `biases` may be empty.
    """
    outputs = []
    for g, (a_g, b_g) in enumerate(zip(a, b, strict=True)):
        y = lowrank_update(x, a_g, b_g, scale, segments)
        if weights:
            y = F.linear(x, weights[g], biases[g] if biases else None) + y
        outputs.append(y)
    return outputs
