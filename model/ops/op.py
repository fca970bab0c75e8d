"""The custom op `vlora::lowrank_linear`: forward and backward over one backend, and its registrations with torch.

T tokens, S samples, G projections that share x. Formulas, with `z = s x A_b` ([T, r], s applied in the accumulator
before rounding):

    y  = x Wᵀ + bias + z B                     dz = s dy Bᵀ
    dx = Σ_g dy_g W_g + dz_g A_gᵀ (one write)  dA_b = x_bᵀ dz_b      dB = zᵀ dy (one GEMM over all tokens)
    dW = dyᵀ x, dbias = Σ_t dy                 only for parameters that require them

Saved for backward, per token: x (d_in elements, which the plain linear with a trained weight saves too) and z (G · r
elements). Parameters and factors are saved as they are, not copied; nothing of size d_out is saved.

Registered with torch: fake (shapes, for `torch.compile`), autograd, autocast and FLOP formulas. No postponed
annotations here: `custom_op` reads the schema from them.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model.ops import cpu
from model.ops.backend import backend_for
from model.ops.partitioned import gathered
from model.ops.rows import Segments


@torch.library.custom_op("vlora::lowrank_linear", mutates_args=())
def lowrank_linear_op(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    segments: Sequence[Tensor],
    per_sample: int,
    max_len: int,
    scale: float,
) -> list[Tensor]:
    """G outputs [T, d_out_g] and z [G, T, r]. `x` [T, d_in]; `segments` as `Segments.tensors()`."""
    layout = Segments.of(segments, per_sample, max_len, x.shape[0])
    return forward(_kernels(x.device), x, weights, biases, a, b, scale, layout)


def forward(
    kernels: ModuleType,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    segments: Segments,
) -> list[Tensor]:
    """The op's forward on one backend (`cpu` or `hybrid`): G outputs and, last, z [G, T, r]."""
    z = kernels.shrink(x, a, scale, segments)
    none = [None] * len(a)
    parts = zip(weights or none, biases or none, z, b, strict=True)
    return [*(kernels.project(x, w, bias, z_g, b_g, segments) for w, bias, z_g, b_g in parts), z]


def _kernels(device: torch.device) -> ModuleType:
    if backend_for(device) == "cpu":
        return cpu
    from model.ops import hybrid  # Triton is imported only where it runs

    return hybrid


@lowrank_linear_op.register_fake
def _(x, weights, biases, a, b, segments, per_sample, max_len, scale):
    return [x.new_empty(x.shape[0], b_g.shape[1]) for b_g in b] + [x.new_empty(len(a), x.shape[0], a[0].shape[2])]


@torch.library.custom_op("vlora::lowrank_linear_backward", mutates_args=())
def lowrank_linear_backward_op(
    dy: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    z: Tensor,
    segments: Sequence[Tensor],
    per_sample: int,
    max_len: int,
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dw: bool,
    need_dbias: bool,
) -> list[Tensor]:
    """The gradients asked for, and only those: dx, da [G, S, d_in, r], db per g, dW per g, dbias per g."""
    layout = Segments.of(segments, per_sample, max_len, x.shape[0])
    needs = (need_dx, need_da, need_db, need_dw, need_dbias)
    return backward(_kernels(x.device), dy, x, weights, a, b, z, scale, layout, *needs)


def backward(
    kernels: ModuleType,
    dy: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    z: Tensor,
    scale: float,
    segments: Segments,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dw: bool,
    need_dbias: bool,
) -> list[Tensor]:
    """The op's backward on one backend, see `lowrank_linear_backward_op`."""
    out = []
    if need_dx or need_da:
        dz = torch.empty_like(z)
        for dz_g, dy_g, b_g in zip(dz, dy, b, strict=True):
            torch.addmm(dz_g, dy_g, b_g.t(), beta=0, alpha=scale, out=dz_g)
    if need_dx:
        out.append(kernels.input_grad(dy, weights, dz, a, segments))
    if need_da:
        out.append(kernels.factor_grad(x, dz, segments))
    if need_db:  # z is zero where there is no sample, so the whole batch is one GEMM
        out += [torch.mm(z_g.t(), dy_g) for z_g, dy_g in zip(z, dy, strict=True)]
    if need_dw:
        out += [torch.mm(dy_g.t(), x) for dy_g in dy]
    if need_dbias:
        out += [dy_g.sum(0) for dy_g in dy]
    return out


@lowrank_linear_backward_op.register_fake
def _(dy, x, weights, a, b, z, segments, per_sample, max_len, scale, need_dx, need_da, need_db, need_dw, need_dbias):
    out = [x.new_empty(x.shape)] if need_dx else []
    out += [x.new_empty(len(a), *a[0].shape)] if need_da else []
    out += [x.new_empty(b_g.shape) for b_g in b] if need_db else []
    out += [x.new_empty(w.shape) for w in weights] if need_dw else []
    out += [x.new_empty(b_g.shape[1]) for b_g in b] if need_dbias else []
    return out


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, a, b, segments, per_sample, max_len, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = [1, len(weights), len(a), len(b), 1, len(segments)]
    ctx.n_biases = len(biases)
    ctx.layout = (per_sample, max_len, scale)
    ctx.save_for_backward(x, *weights, *a, *b, output[-1], *segments)


def _backward(ctx, grads):
    (x,), weights, a, b, (z,), segments = _split(ctx.saved_tensors, ctx.counts)
    need_dx, need_dw, need_dbias, need_da, need_db = (
        any(need) if isinstance(need, list) else need for need in ctx.needs_input_grad[:5]
    )
    dy = [x.new_zeros(x.shape[0], b_g.shape[1]) if d is None else d for d, b_g in zip(grads[:-1], b, strict=True)]
    with gathered(weights):
        out = lowrank_linear_backward_op(
            dy, x, weights, a, b, z, segments, *ctx.layout, need_dx, need_da, need_db, need_dw, need_dbias
        )
    groups = len(a)
    dx = out.pop(0) if need_dx else None
    da = list(out.pop(0).unbind(0)) if need_da else [None] * groups
    counts = [groups * need_db, len(weights) * need_dw, ctx.n_biases * need_dbias]
    db, dw, dbias = _split(out, counts)
    return (
        dx,
        dw or [None] * len(weights),
        dbias or [None] * ctx.n_biases,
        da,
        db or [None] * groups,
        [None] * len(segments),
        None,
        None,
        None,
    )


def _split(items: Sequence, counts: Sequence[int]) -> list[list]:
    parts, start = [], 0
    for count in counts:
        parts.append(list(items[start : start + count]))
        start += count
    return parts


lowrank_linear_op.register_autograd(_backward, setup_context=_setup_context)


def _register_autocast(device_type: str) -> torch.library.Library:
    """Run the op in autocast's dtype, whichever it is (`custom_op.register_autocast` would fix one)."""

    def in_autocast_dtype(x, weights, biases, a, b, *layout):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(t: Tensor) -> Tensor:
            return t if t.dtype == torch.float64 else t.to(dtype)

        lists = ([cast(t) for t in part] for part in (weights, biases, a, b))
        with torch.autocast(device_type, enabled=False):
            return lowrank_linear_op(cast(x), *lists, *layout)

    library = torch.library.Library("vlora", "FRAGMENT")
    library.impl("lowrank_linear", in_autocast_dtype, "Autocast" + device_type.upper())
    return library


_AUTOCAST = [_register_autocast(device_type) for device_type in ("cpu", "cuda")]
"""Registrations live as long as these objects."""


@register_flop_formula(torch.ops.vlora.lowrank_linear)
def _flops(x: Any, weights: Any, biases: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    tokens, d_in = x
    flops = sum(2 * tokens * a_g[2] * (d_in + b_g[1]) for a_g, b_g in zip(a, b, strict=True))
    return flops + sum(2 * tokens * d_in * w[0] for w in weights)


@register_flop_formula(torch.ops.vlora.lowrank_linear_backward)
def _flops_backward(dy: Any, x: Any, weights: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    need_dx, need_da, need_db, need_dw, _ = args[5:10]  # behind z, segments, per_sample, max_len and scale
    tokens, d_in = x
    flops = 0
    for a_g, b_g in zip(a, b, strict=True):
        thin, wide = 2 * tokens * a_g[2] * d_in, 2 * tokens * a_g[2] * b_g[1]
        flops += wide * (need_dx or need_da) + wide * need_db + thin * need_dx + thin * need_da
    return flops + sum(2 * tokens * d_in * w[0] for w in weights) * (need_dx + need_dw)
