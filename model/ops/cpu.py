"""The CPU backend: as few passes over memory as plain torch allows, any floating dtype.

Both GEMMs of the update accumulate in place (``addmm_``, ``baddbmm_``), so nothing of size [T, d_out] or [T, d_in] is
written beyond what the plain linear layer writes. When every sample owns the same number of consecutive tokens, one
batched GEMM serves all of them; otherwise one GEMM per run of tokens of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.rows import NO_SAMPLE, Segments

Run = tuple[int, int, int]
"""(first token, one past the last, sample)."""


def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    segments: Segments,
) -> list[Tensor]:
    """Outputs ``y_g`` [T, d_out_g] and, last, ``z`` [G, T, r] with ``z_g = scale * x A_g`` (see ``lowrank.py``)."""
    per_sample = segments.per_sample
    z = x.new_empty(len(a), x.shape[0], a[0].shape[2])
    runs = [] if per_sample else _runs(segments)
    if not per_sample and not _covers(runs, x.shape[0]):
        z.zero_()
    for z_g, a_g in zip(z, a, strict=True):
        if per_sample:
            out = z_g.view(-1, per_sample, z_g.shape[1])
            torch.baddbmm(out, _by_sample(x, per_sample), a_g, beta=0, alpha=scale, out=out)
        else:
            for start, end, sample in runs:
                out = z_g[start:end]
                torch.addmm(out, x[start:end], a_g[sample], beta=0, alpha=scale, out=out)

    outputs = []
    for g, b_g in enumerate(b):
        if weights:
            w_t = weights[g].t()
            y = torch.addmm(biases[g], x, w_t) if biases else torch.mm(x, w_t)
        elif per_sample:
            outputs.append(torch.mm(z[g], b_g))
            continue
        else:
            y = x.new_zeros(x.shape[0], b_g.shape[1])
        for start, end in [(0, x.shape[0])] if per_sample else _spans(runs):
            y[start:end].addmm_(z[g, start:end], b_g)
        outputs.append(y)
    return [*outputs, z]


def backward(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    z: Tensor,
    scale: float,
    segments: Segments,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients ``dx`` [T, d_in], ``da`` [G, S, d_in, r] and ``db`` per projection (see ``lowrank.py``)."""
    per_sample = segments.per_sample
    runs = [] if per_sample else _runs(segments)
    dz = None
    if need_dx or need_da:
        dz = torch.empty_like(z)
        for dz_g, dy_g, b_g in zip(dz, dy, b, strict=True):
            torch.addmm(dz_g, dy_g, b_g.t(), beta=0, alpha=scale, out=dz_g)

    dx = _dx(dy, x, weights, a, dz, runs, per_sample) if need_dx else None
    da = _da(x, a, dz, runs, per_sample) if need_da else None
    # z is zero where there is no sample, so the whole batch is one GEMM.
    db = [torch.mm(z_g.t(), dy_g) for z_g, dy_g in zip(z, dy, strict=True)] if need_db else []
    return dx, da, db


def _dx(
    dy: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    dz: Tensor,
    runs: list[Run],
    per_sample: int,
) -> Tensor:
    dx = torch.mm(dy[0], weights[0]) if weights else torch.zeros_like(x, memory_format=torch.contiguous_format)
    for dy_g, w in zip(dy[1:], weights[1:], strict=True) if weights else ():
        dx.addmm_(dy_g, w)
    for dz_g, a_g in zip(dz, a, strict=True):
        if per_sample:
            _by_sample(dx, per_sample).baddbmm_(_by_sample(dz_g, per_sample), a_g.transpose(1, 2))
        else:
            for start, end, sample in runs:
                dx[start:end].addmm_(dz_g[start:end], a_g[sample].t())
    return dx


def _da(x: Tensor, a: list[Tensor], dz: Tensor, runs: list[Run], per_sample: int) -> Tensor:
    da = x.new_empty(len(a), *a[0].shape)
    if per_sample:
        x_t = _by_sample(x, per_sample).transpose(1, 2)
        for da_g, dz_g in zip(da, dz, strict=True):
            torch.bmm(x_t, _by_sample(dz_g, per_sample), out=da_g)
        return da
    seen: set[int] = set()
    for start, end, sample in runs:
        for da_g, dz_g in zip(da, dz, strict=True):  # a sample may own several runs: the first writes, the others add
            out = da_g[sample]
            torch.addmm(out, x[start:end].t(), dz_g[start:end], beta=float(sample in seen), out=out)
        seen.add(sample)
    for sample in set(range(da.shape[1])) - seen:
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


def _covers(runs: list[Run], tokens: int) -> bool:
    return _spans(runs) == [(0, tokens)]
