"""The CPU backend: as few passes over memory as plain torch allows, any floating dtype.

Both GEMMs of an output, and of the gradient of x, accumulate in one place (`addmm_`, `baddbmm_`), so nothing of
size [T, d_out] or [T, d_in] is written beyond what the plain linear layer writes. When every sample owns the same
number of consecutive tokens, one batched GEMM serves all of them; otherwise one GEMM per run of tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.ops.rows import NO_SAMPLE, Segments

Run = tuple[int, int, int]
"""(first token, one past the last, sample)."""


def shrink(x: Tensor, a: Sequence[Tensor], scale: float, segments: Segments) -> Tensor:
    """`z_g = scale * x A_g` [G, T, r]; zero for tokens without a sample. x [T, d_in]; a: G of [S, d_in, r]."""
    z = x.new_empty(len(a), x.shape[0], a[0].shape[2])
    if n := segments.per_sample:
        for z_g, a_g in zip(z, a, strict=True):
            out = _by_sample(z_g, n)
            torch.baddbmm(out, _by_sample(x, n), a_g, beta=0, alpha=scale, out=out)
        return z
    runs = _runs(segments)
    if _spans(runs) != [(0, x.shape[0])]:
        z.zero_()
    for start, end, sample in runs:
        for z_g, a_g in zip(z, a, strict=True):
            out = z_g[start:end]
            torch.addmm(out, x[start:end], a_g[sample], beta=0, alpha=scale, out=out)
    return z


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`x Wᵀ + bias + z B` [T, d_out]; without a weight only `z B`. Tokens without a sample cost nothing more."""
    spans = [(0, x.shape[0])] if segments.per_sample else _spans(_runs(segments))
    if weight is not None:
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    elif segments.per_sample:
        return torch.mm(z, b)
    else:
        y = x.new_zeros(x.shape[0], b.shape[1])
    for start, end in spans:
        y[start:end].addmm_(z[start:end], b)
    return y


def input_grad(
    dy: Sequence[Tensor], weights: Sequence[Tensor], dz: Tensor, a: Sequence[Tensor], segments: Segments
) -> Tensor:
    """`dx = Σ_g dy_g W_g + dz_g A_gᵀ` [T, d_in], accumulated in one buffer; `weights` may be empty."""
    dx = torch.mm(dy[0], weights[0]) if weights else dz.new_zeros(dz.shape[1], a[0].shape[1])
    for dy_g, w in zip(dy[1:], weights[1:], strict=True) if weights else ():
        dx.addmm_(dy_g, w)
    if n := segments.per_sample:
        for dz_g, a_g in zip(dz, a, strict=True):
            _by_sample(dx, n).baddbmm_(_by_sample(dz_g, n), a_g.transpose(1, 2))
        return dx
    for start, end, sample in _runs(segments):
        for dz_g, a_g in zip(dz, a, strict=True):
            dx[start:end].addmm_(dz_g[start:end], a_g[sample].t())
    return dx


def factor_grad(x: Tensor, dz: Tensor, segments: Segments) -> Tensor:
    """`dA_g = x_sᵀ dz_g` [G, S, d_in, r] for every sample, exactly zero for samples without tokens."""
    samples = len(segments.first) - 1
    da = x.new_empty(dz.shape[0], samples, x.shape[1], dz.shape[2])
    if n := segments.per_sample:
        for da_g, dz_g in zip(da, dz, strict=True):
            torch.bmm(_by_sample(x, n).transpose(1, 2), _by_sample(dz_g, n), out=da_g)
        return da
    seen: set[int] = set()
    for start, end, sample in _runs(segments):
        for da_g, dz_g in zip(da, dz, strict=True):  # a sample may own several runs: the first writes, the others add
            out = da_g[sample]
            torch.addmm(out, x[start:end].t(), dz_g[start:end], beta=float(sample in seen), out=out)
        seen.add(sample)
    for sample in set(range(samples)) - seen:
        da[:, sample].zero_()
    return da


def _by_sample(t: Tensor, per_sample: int) -> Tensor:
    return t.view(-1, per_sample, t.shape[1])


def _runs(segments: Segments) -> list[Run]:
    """Non-empty segments that have a sample; neighbours of one sample joined."""
    offsets, samples = segments.offsets.tolist(), segments.sample.tolist()
    runs: list[Run] = []
    for i, sample in enumerate(samples):
        start, end = offsets[i], offsets[i + 1]
        if sample == NO_SAMPLE or start == end:
            continue
        if runs and runs[-1][1] == start and runs[-1][2] == sample:
            runs[-1] = (runs[-1][0], end, sample)
        else:
            runs.append((start, end, sample))
    return runs


def _spans(runs: list[Run]) -> list[tuple[int, int]]:
    """Runs joined over samples: where the update is not zero."""
    spans: list[tuple[int, int]] = []
    for start, end, _ in runs:
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans
