"""Part b: the low-rank op at 7B shapes, forward and backward, against the plain layers and the released code's form."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import kernels
from benchmarks.gpu.part import Context
from benchmarks.gpu.timing import roof, timed
from model.ops import lowrank_delta, lowrank_linear, lowrank_linear_group, set_backend, split_perceptual, tuner
from model.ops.triton.gemm import TILE

TYPES = ("q", "k", "v", "o", "m")


def every_kernel(context: Context) -> None:
    """Each kernel alone: rates, share of this card's roofline, error against float64."""
    shapes = [(2, 16)] if context.tiny else [(96, 64), (16, 512)]
    shape = {"d": 32, "r": 16, "matrices": 2} if context.tiny else {}
    for samples, length in shapes:

        def bench(run: Callable[[], object]) -> float:
            return timed(run, context.device, 0.2)["ms"]

        found = kernels.measure(samples, length, bench, device=context.device.type, dtype=context.dtype, **shape)
        for name, row in found.items():
            context.row(f"{samples} x {length}, {name}", row)


def whole_op(context: Context) -> None:
    """q, k, v, o and m of every placed layer, frozen weights: plain, ours (hybrid, fused), einsum and index."""
    limit = roof(context.device, context.dtype, context.tiny)
    context.row("roofline of this device", limit)
    shapes = [(2, 8)] if context.tiny else [(96, 64), (16, 512)]
    d, layers = (32, 2) if context.tiny else (4096, 8)
    for samples, length in shapes:
        for r in [16] if context.tiny else [16, 64, 128]:
            _one_shape(context, limit, samples, length, d, r, layers)


def _one_shape(
    context: Context, limit: dict[str, float], samples: int, length: int, d: int, r: int, layers: int
) -> None:
    device, dtype = context.device, context.dtype
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, dy = leaf(samples, length, d), leaf(samples, length, d).detach()
    weights = {t: leaf(d, d).detach() for t in TYPES if t != "m"}
    generated = {t: leaf(samples, layers, d, r) for t in TYPES}
    b = {t: leaf(r, d) for t in TYPES}
    leaves = [x, *generated.values(), *b.values()]

    def plain() -> list[Tensor]:
        return [linear(x, w) for _ in range(layers) for w in weights.values()]

    def ours() -> list[Tensor]:
        factors = {t: split_perceptual(a) for t, a in generated.items()}
        out: list[Tensor] = []
        for i in range(layers):
            a = {t: factors[t][i] for t in TYPES}
            out += lowrank_linear_group(
                x, [weights[t] for t in "qkv"], [a[t] for t in "qkv"], [b[t] for t in "qkv"], 1.0
            )
            out.append(lowrank_linear(x, weights["o"], a["o"], b["o"], 1.0))
            out.append(lowrank_delta(x, a["m"], b["m"], 1.0))
        return out

    def einsum_and_index() -> list[Tensor]:
        out = []
        for i in range(layers):
            for t in TYPES:
                low = torch.einsum("blr,rd->bld", torch.einsum("bld,bdr->blr", x, generated[t][:, i]), b[t])
                out.append(linear(x, weights[t]) + low if t in weights else low)
        return out

    def step(form: Callable[[], list[Tensor]]) -> None:
        for tensor in leaves:
            tensor.grad = None
        outputs = form()
        torch.autograd.backward(outputs, [dy] * len(outputs))

    flops, moved = _work(samples, length, d, r, layers, dtype.itemsize)
    ideal = max(flops / limit["matmul_flops_per_s"], moved / limit["copy_bytes_per_s"])
    base: float | None = None
    for name, form, backend in (
        ("plain linear", plain, "auto"),
        ("ours, hybrid", ours, "hybrid"),
        ("ours, fused", ours, "fused"),
        ("einsum and index", einsum_and_index, "auto"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            if backend == "fused":
                _use_fused_everywhere(Path(folder), device, samples * length, d, r, dtype)
            set_backend(backend, device)
            row = timed(partial(step, form), device)
            set_backend("auto")
            os.environ.pop("VLORA_TUNING_DIR", None)
        seconds = 1e-3 * row["ms"]
        base = base or seconds
        row["over_plain"] = seconds / base - 1
        if form is not plain:
            row |= {"TFLOP_per_s": flops / seconds / 1e12, "TB_per_s": moved / seconds / 1e12,
                    "share_of_roofline": ideal / seconds}  # fmt: skip
        context.row(f"{samples} x {length}, rank {r}, {name}", row)


def _work(samples: int, length: int, d: int, r: int, layers: int, item: int) -> tuple[float, float]:
    """FLOPs and bytes of forward and backward at their least: every operand of every product once."""
    tokens = samples * length
    base = 2 * 2 * tokens * d * d * 4  # forward and the gradient of x, q k v o
    thin = 2 * tokens * d * r * 5 * (2 + 4)  # x A, z B; dz, dB, dx, dA
    x, w, a, z = tokens * d, d * d, samples * d * r, tokens * r
    forward = (x + 3 * w + 3 * a + 3 * x) + (2 * x + w + a) + (2 * x + a) + 5 * 2 * z
    backward = (3 * x + 3 * w + 2 * 3 * a + 2 * x) + (3 * x + w + 2 * a) + (3 * x + 2 * a) + 5 * 3 * z
    return float(layers * (base + thin)), float(layers * (forward + backward) * item)


def _use_fused_everywhere(folder: Path, device: torch.device, tokens: int, d: int, r: int, dtype: torch.dtype) -> None:
    """A tuning table that allows the default tile at this shape, whether it pays or not: that is the question."""
    os.environ["VLORA_TUNING_DIR"] = str(folder)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tuner.table_path(name).write_text(json.dumps({tuner.key(tokens, d, d, r, dtype): {"tile": TILE, "ratio": 1.0}}))
