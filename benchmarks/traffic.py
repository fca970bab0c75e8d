"""Bytes and kernels of a piece of torch code, counted on meta tensors: no memory, no device, real shapes.

    python -m benchmarks.traffic

prints the backward of the low-rank term of a 7B model (8 layers by 5 projections, 96 x 64 tokens, rank 64), written as
the released VLoRA code writes it (index the generator's output, two einsums, an addition) and as our op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.ops import cpu, lowrank_delta, op, split_perceptual
from model.ops.rows import Segments


@dataclass
class Traffic:
    """Bytes read and written, and kernels launched."""

    bytes: int = 0
    kernels: int = 0


class CountTraffic(TorchDispatchMode):
    """Counts every ATen kernel that moves data: each tensor argument is read once, each result written once.

    Views move nothing. Our custom op is opened up and its own kernels are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vlora":
            with self:
                return _open_up(func, args)
        out = func(*args, **kwargs)
        if not func.is_view and func not in _MOVES_NOTHING:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}.values()
            self.found.bytes += sum(t.numel() * t.element_size() for t in [*tensors, *written])
            self.found.kernels += 1
        return out


_MOVES_NOTHING = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten._unsafe_view.default,
}


def _open_up(func: Any, args: tuple) -> list[Tensor]:
    if func is torch.ops.vlora.lowrank_linear.default:
        x, weights, biases, a, b, tensors, per_sample, max_len, scale = args
        segments = Segments.of(tensors, per_sample, max_len, x.shape[0])
        return op.forward(cpu, x, weights, biases, a, b, scale, segments)
    dy, x, weights, a, b, z, tensors, per_sample, max_len, scale, *needs = args
    segments = Segments.of(tensors, per_sample, max_len, x.shape[0])
    return op.backward(cpu, dy, x, weights, a, b, z, scale, segments, *needs)


def backward_traffic(term: Callable[[], Tensor]) -> Traffic:
    """Traffic of the backward of `term()` alone."""
    y = term()
    seed = torch.empty_like(y)
    with CountTraffic() as mode:
        y.backward(seed)
    return mode.found


def low_rank_backward(
    samples: int = 96, length: int = 64, d: int = 4096, r: int = 64, layers: int = 8, types: int = 5
) -> dict[str, Traffic]:
    """The backward of all low-rank terms of one step, bf16: "einsum and index", "einsum and unbind", "ours"."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    def terms(form: str) -> Callable[[], Tensor]:
        generated = [meta(samples, layers, d, r) for _ in range(types)]
        whole = meta(samples, types, layers, d, r)
        x = [[meta(samples, length, d) for _ in range(types)] for _ in range(layers)]
        b = [[meta(r, d) for _ in range(types)] for _ in range(layers)]

        def run() -> Tensor:
            split = [split_perceptual(g) for g in generated]
            unbound = [part.unbind(1) for part in whole.unbind(1)]
            outputs = []
            for i in range(layers):
                for t in range(types):
                    if form == "ours":
                        outputs.append(lowrank_delta(x[i][t], split[t][i], b[i][t], 1.0))
                    else:
                        a = whole[:, t, i] if form == "einsum and index" else unbound[t][i]
                        z = torch.einsum("bld,bdr->blr", x[i][t], a)
                        outputs.append(torch.einsum("blr,brd->bld", z, b[i][t].expand(samples, r, d)))
            return torch.stack(outputs)

        return run

    return {form: backward_traffic(terms(form)) for form in ("einsum and index", "einsum and unbind", "ours")}


def main() -> None:
    """Print the three forms and their ratios."""
    found = low_rank_backward()
    base = found["einsum and index"]
    for form, traffic in found.items():
        share = traffic.bytes / base.bytes
        print(f"{form:20s} {share:6.3f} of the bytes ({traffic.bytes / 1e9:6.1f} GB), {traffic.kernels} kernels")


if __name__ == "__main__":
    main()
