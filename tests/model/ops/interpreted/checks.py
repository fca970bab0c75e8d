"""Every Triton kernel against float64, under the interpreter or on a GPU; used on the real kernels and on broken ones.

A check takes the op's module, so that the mutation test can hand in a mutant. All outputs start as NaN; under the
interpreter all tensors lie between forbidden pages, on a GPU between NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from triton import knobs

from model.ops.rows import NO_SAMPLE, Rows, Segments
from tests.model.ops.interpreted import guard

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not knobs.runtime.interpret else "cpu")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 2.3e-3}
"""Relative to the float64 result. bf16 rounding costs 1.7e-3; 6e-3 would let a truncating conversion through."""

DTYPES = tuple(TOLERANCE)

LAYOUTS = {
    "equal rows": ((32, 32), (0, 1), 2),
    "ragged": ((7, 0, 45, 1), (0, 1, 2, 3), 4),
    "shared and missing": (
        (16, 33, 5, 16),
        (1, NO_SAMPLE, 0, 1),
        3,
    ),  # sample 2 has no tokens, sample 1 has two segments
}
"""Name: segment lengths, their samples, number of samples."""


def guarded(t: Tensor, *, at_start: bool = False) -> Tensor:
    """A copy of `t` on the device, between forbidden pages (CPU) or between NaN (GPU)."""
    if DEVICE.type == "cpu":
        return guard.guarded(t, at_start=at_start)
    if not t.is_floating_point():
        return t.to(DEVICE)
    around = torch.full((t.numel() + 2 * _MARGIN,), float("nan"), dtype=t.dtype, device=DEVICE)
    return around[_MARGIN : _MARGIN + t.numel()].view(t.shape).copy_(t)


_MARGIN = 4096  # elements; a multiple of 16 bytes, so that alignment is that of a fresh tensor


@contextmanager
def poisoned():
    """Uninitialised memory of the kernels' outputs is NaN and guarded."""
    real = torch.empty

    def empty(*shape, dtype=None, device=None):
        t = real(*shape, dtype=dtype, device=DEVICE)
        return guarded(t.fill_(float("nan")) if t.is_floating_point() else t)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real


def layout(name: str) -> tuple[Segments, Tensor, int, int]:
    """Segments, the sample of each token (int64 [T]), T and S."""
    lengths, samples, n = LAYOUTS[name]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    segments = Rows.packed(offsets, samples, n).segments(0, torch.device("cpu"))
    of_token = torch.tensor(samples).repeat_interleave(torch.tensor(lengths)).to(DEVICE)
    segments = Segments(*map(guarded, segments.tensors()), segments.per_sample, segments.max_len, segments.n_tokens)
    return segments, of_token, sum(lengths), n


def randn(*shape: int, dtype: torch.dtype, seed: int, at_start: bool = False) -> Tensor:
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return guarded(t.to(dtype), at_start=at_start)


def per_token(a: Tensor, of_token: Tensor) -> Tensor:
    """Each token's factor in float64, zero where it has no sample: [T, d_in, r]."""
    return a.double()[of_token.clamp(min=0)] * (of_token >= 0)[:, None, None]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def check_shrink(kernels: ModuleType, dtype: torch.dtype, where: str, d_in: int, r: int, groups: int) -> None:
    segments, of_token, tokens, n = layout(where)
    x = randn(tokens, d_in, dtype=dtype, seed=1)
    a = [randn(n, d_in, r, dtype=dtype, seed=2 + g, at_start=g == 1) for g in range(groups)]
    with poisoned():
        z = kernels.shrink(x, a, 0.5, segments, BLOCK_T=32, BLOCK_K=32)
    want = torch.stack([0.5 * torch.einsum("tk,tkr->tr", x.double(), per_token(a_g, of_token)) for a_g in a])
    assert_close(z, want, dtype)
    assert (z[:, of_token < 0] == 0).all()


def check_expand(kernels: ModuleType, dtype: torch.dtype, where: str, d_in: int, r: int, groups: int) -> None:
    segments, of_token, tokens, n = layout(where)
    dz = randn(groups, tokens, r, dtype=dtype, seed=1)
    a = [randn(n, d_in, r, dtype=dtype, seed=2 + g, at_start=g == 1) for g in range(groups)]
    with poisoned():
        dx = kernels.expand(dz, a, segments, BLOCK_T=32, BLOCK_K=32, BLOCK_R=16)
    want = sum(torch.einsum("tr,tkr->tk", dz[g].double(), per_token(a[g], of_token)) for g in range(groups))
    assert_close(dx, want, dtype)
    assert (dx[of_token < 0] == 0).all()


def check_factor_grad(kernels: ModuleType, dtype: torch.dtype, where: str, d_in: int, r: int, groups: int) -> None:
    segments, of_token, tokens, n = layout(where)
    x = randn(tokens, d_in, dtype=dtype, seed=1)
    dz = randn(groups, tokens, r, dtype=dtype, seed=2)
    with poisoned():
        da = kernels.factor_grad(x, dz, segments, BLOCK_K=32, BLOCK_T=16)
    owner = torch.nn.functional.one_hot(of_token.clamp(min=0), n).double() * (of_token >= 0)[:, None]
    assert_close(da, torch.einsum("ts,tk,gtr->gskr", owner, x.double(), dz.double()), dtype)
    assert (da[:, owner.sum(0) == 0] == 0).all()


def check_gemm(
    kernels: ModuleType, dtype: torch.dtype, where: str, d: int, n_out: int, r: int, per_sample: bool
) -> None:
    segments, of_token, tokens, n = layout(where)
    x, z = randn(tokens, d, dtype=dtype, seed=1), randn(tokens, r, dtype=dtype, seed=2)
    # As the backward passes them: a transposed weight, and the transposed A of each sample.
    w = randn(d, n_out, dtype=dtype, seed=3).t() if per_sample else randn(n_out, d, dtype=dtype, seed=3)
    low = (
        randn(n, n_out, r, dtype=dtype, seed=4).transpose(1, 2) if per_sample else randn(r, n_out, dtype=dtype, seed=4)
    )
    extra = randn(tokens, n_out, dtype=dtype, seed=5) if per_sample else None
    bias = None if per_sample else randn(n_out, dtype=dtype, seed=6)
    want = x.double() @ w.double().t()
    if per_sample:
        want += torch.einsum("tr,trn->tn", z.double(), per_token(low, of_token)) + extra.double()
    else:
        want += z.double() @ low.double() + bias.double()
    with poisoned():
        y = kernels.gemm_lowrank(
            x,
            w,
            z,
            low,
            segments,
            bias=bias,
            add_to=extra,
            BLOCK_M=32,
            BLOCK_N=32,
            BLOCK_K=32,
            BLOCK_R=16,
            GROUP_M=2,
        )
    assert_close(y, want, dtype)


def check_merge(kernels: ModuleType, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...], r: int, cut: int) -> None:
    """`cut` > 0 merges each weight as two flat pieces, as two ZeRO-3 ranks would."""
    weights = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    a = [randn(d_in, r, dtype=dtype, seed=20 + i) for i, (_, d_in) in enumerate(shapes)]
    b = [randn(r, d_out, dtype=dtype, seed=40 + i) for i, (d_out, _) in enumerate(shapes)]
    sources, starts, owner = list(weights), [0] * len(weights), list(range(len(weights)))
    if cut:
        sources, starts, owner = [], [], []
        for i, w in enumerate(weights):
            at = min(cut, w.numel())
            sources += [guarded(w.view(-1)[:at]), guarded(w.view(-1)[at:])]
            starts += [0, at]
            owner += [i, i]
    targets = [guarded(torch.full_like(s, float("nan"))) for s in sources]
    kernels.merge(
        sources,
        targets,
        [a[i] for i in owner],
        [b[i] for i in owner],
        0.25,
        starts,
        BLOCK_N=32,
        BLOCK_K=32,
        BLOCK_R=16,
    )
    for i, w in enumerate(weights):
        got = torch.cat([t.reshape(-1) for t, o in zip(targets, owner, strict=True) if o == i]).view(w.shape)
        assert_close(got, w.double() + 0.25 * (a[i].double() @ b[i].double()).t(), dtype)


def kernel_module(case: str) -> ModuleType:
    """The file of `model/ops/triton` that a case checks: the first word of its name."""
    return importlib.import_module(f"model.ops.triton.{case.split()[0]}")


def cases(full: bool) -> list[tuple[str, Callable[[ModuleType], None]]]:
    """Named checks; `full` for the suite, otherwise the least that kills every mutant of the list."""
    found: list[tuple[str, Callable[[ModuleType], None]]] = []

    def add(check: Callable, *args) -> None:
        name = " ".join(str(getattr(arg, "__name__", arg)).removeprefix("torch.") for arg in (check, *args))
        found.append((name.removeprefix("check_"), lambda kernels: check(kernels, *args)))

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for dtype in (f32, bf16):
        for where in ("ragged", "shared and missing"):
            add(check_shrink, dtype, where, 72, 24, 3)
            add(check_expand, dtype, where, 72, 24, 3)
            add(check_factor_grad, dtype, where, 72, 24, 3)
            add(check_gemm, dtype, where, 72, 40, 24, True)
        add(check_gemm, dtype, "ragged", 72, 40, 24, False)
        add(check_merge, dtype, ((48, 72), (33, 40)), 24, 0)
        add(check_merge, dtype, ((48, 72), (33, 40)), 24, 1001)
    if not full:
        return found
    for dtype in DTYPES:
        add(check_shrink, dtype, "equal rows", 64, 64, 2)
        add(check_expand, dtype, "equal rows", 64, 64, 2)
        add(check_factor_grad, dtype, "equal rows", 64, 64, 2)
        add(check_gemm, dtype, "equal rows", 64, 64, 32, True)
        add(check_gemm, dtype, "equal rows", 64, 64, 32, False)
        add(check_merge, dtype, ((64, 64), (32, 64)), 16, 0)
        add(check_merge, dtype, ((64, 64), (32, 64)), 16, 1024)
    for r in (1, 16, 100, 256):
        add(check_shrink, f32, "ragged", 40, r, 1)
        add(check_expand, f32, "ragged", 40, r, 1)
        add(check_factor_grad, f32, "ragged", 40, r, 1)
        add(check_gemm, f32, "ragged", 40, 48, r, False)
        add(check_gemm, f32, "ragged", 40, 48, r, True)
        add(check_merge, f32, ((40, 24),), r, 0)
    add(check_shrink, f16, "shared and missing", 72, 24, 3)
    return found
