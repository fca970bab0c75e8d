"""Adds perceptual weights to any Hugging Face decoder, by module name, without forking its code.

The classes of the decoder layers and of the placed projections are swapped (`model.decoder.swap`). The weights travel
as a keyword of each decoder layer's forward, which transformers passes down from the top and captures for
recomputation, so gradient checkpointing sees the same deltas twice.

Projections that share their input (q, k, v; gate, up) are one op: x is read once for all their A, and the gradient of x
is accumulated in one buffer where autograd would add up one per projection. The decoder calls them one by one; the
first call computes all, in a module of its own (`SharedInput`) so that ZeRO-3 has the weights whole just there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.decoder.swap import swap, unswap
from model.generator.placement import Placement, decoder_layers
from model.generator.weights import PerceptualWeights
from model.ops import Rows, Segments, lowrank_delta, lowrank_linear, lowrank_linear_group

SHARING_INPUT = (("q", "k", "v"), ("gate", "up"))
"""Types whose projections read the same tensor in every decoder we place deltas in."""


class _Added(NamedTuple):
    """What one decoder layer adds: the factors A [S, d_in, r] and B [r, d_out] by type, their scale and the rows."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    rows: Rows | Segments | None

    @classmethod
    def to(cls, layer: int, weights: PerceptualWeights) -> _Added:
        return cls(weights.for_layer(layer), weights.scale, weights.rows)


_NOTHING = _Added({}, 1.0, None)


class _LayerState:
    """What the projections of one decoder layer add during the layer's forward."""

    __slots__ = ("added", "groups", "pinned")

    def __init__(self) -> None:
        self.pinned: PerceptualWeights | None = None
        self.groups: list[SharedInput] = []
        self.added = _NOTHING

    def clear(self) -> None:
        self.added = _NOTHING
        for group in self.groups:
            group.clear()


class SharedInput(nn.Module):
    """The placed projections of one decoder layer that read the same input, as one op.

    It owns no parameters and adds no key to the state dict. `linears` are the projections by type.
    """

    def __init__(self, state: _LayerState, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.linears = linears  # in a dict, so that nn.Module does not count them twice
        self._state = state
        self._input: Tensor | None = None
        self._ready: dict[str, Tensor] = {}

    def parameters_read(self) -> list[nn.Parameter]:
        """The projections' weights and biases: external to this module, but read by its forward and backward."""
        return [p for linear in self.linears.values() for p in linear.parameters()]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every projection that has deltas now, in their order."""
        factors, scale, rows = self._state.added
        a, b = zip(*(factors[t] for t in self._types()), strict=True)
        linears = [self.linears[t] for t in self._types()]
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return lowrank_linear_group(x, weights, a, b, scale, biases=biases, rows=rows)

    def output(self, weight_type: str, x: Tensor) -> Tensor:
        """That of one projection. All are computed when the first is asked for, and kept until each was handed out."""
        if self._input is not x or weight_type not in self._ready:
            self._ready = dict(zip(self._types(), self(x), strict=True))
            self._input = x
        return self._ready.pop(weight_type)

    def _types(self) -> list[str]:
        return [t for t in self.linears if t in self._state.added.factors]

    def clear(self) -> None:
        """Drop what was not asked for."""
        self._input, self._ready = None, {}


class _PerceptualLayer(nn.Module):
    """Mixin in front of a decoder layer's class."""

    def forward(self, *args: Any, perceptual_weights: PerceptualWeights | None = None, **kwargs: Any) -> Any:
        weights = perceptual_weights if perceptual_weights is not None else self._perceptual_state.pinned
        added = _NOTHING if weights is None else _Added.to(self._perceptual_index, weights)
        return self._perceptual_forward(added, *args, **kwargs)

    def _perceptual_forward(self, added: _Added, *args: Any, **kwargs: Any) -> Any:
        state: _LayerState = self._perceptual_state
        state.added = added
        try:
            return super().forward(*args, **kwargs)
        finally:
            state.clear()


class _PerceptualModule(nn.Module):
    """Mixin in front of a placed projection (or MLP, for `m`): y = f(x) + s (x A) B."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        added: _Added = self._perceptual_state.added
        factors = added.factors.get(self._perceptual_type)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        if self._perceptual_fused:
            return lowrank_linear(x, self.weight, *factors, added.scale, bias=self.bias, rows=added.rows)
        out = super().forward(x, *args, **kwargs)
        delta = lowrank_delta(x, *factors, added.scale, rows=added.rows)
        if isinstance(out, tuple):  # an MLP of experts that returns what its router said as well
            return (out[0] + delta, *out[1:])
        return out + delta


class _GroupedProjection(nn.Module):
    """Mixin in front of a placed projection that shares its input with others.

    Overrides the call rather than `forward`: the hooks of this module (ZeRO-3's) would gather the weight a second time.
    """

    def __call__(self, x: Tensor) -> Tensor:
        if self._perceptual_type not in self._perceptual_state.added.factors:
            return super().__call__(x)
        return self._perceptual_group[0].output(self._perceptual_type, x)


def inject(llm: nn.Module, placement: Placement) -> None:
    """Make `llm` accept `perceptual_weights=` in its forward. Without it, it computes exactly what it did before.

    Raises:
        ValueError: `llm` was injected already.
    """
    for index, layer in enumerate(decoder_layers(llm)):
        if isinstance(layer, _PerceptualLayer):
            raise ValueError("perceptual weights are already injected into this model")
        state = _LayerState()
        swap(layer, _PerceptualLayer, _perceptual_state=state, _perceptual_index=index)
        modules = {site.type: layer.get_submodule(site.module) for site in placement.sites if site.layer == index}
        grouped: dict[str, SharedInput] = {}
        for types in SHARING_INPUT:
            linears = {t: modules[t] for t in types if t in modules}
            if len(linears) > 1 and _one_op(linears):
                group = SharedInput(state, linears)
                layer.add_module(_group_name(types), group)
                state.groups.append(group)
                grouped |= dict.fromkeys(linears, group)
        for weight_type, module in modules.items():
            known: dict[str, Any] = {"_perceptual_state": state, "_perceptual_type": weight_type}
            if weight_type in grouped:
                # In a tuple, so that nn.Module does not look into it.
                swap(module, _GroupedProjection, **known, _perceptual_group=(grouped[weight_type],))
            else:
                # Quantised linears and the like keep their own forward; a plain one is a single op with its delta.
                swap(module, _PerceptualModule, **known, _perceptual_fused=type(module) is nn.Linear)


def _one_op(linears: dict[str, nn.Module]) -> bool:
    """Whether one op can compute them: plain linear layers, all or none with a bias."""
    plain = all(type(linear) is nn.Linear for linear in linears.values())
    return plain and len({linear.bias is None for linear in linears.values()}) == 1


def _group_name(types: tuple[str, ...]) -> str:
    return "perceptual_" + "_".join(types)


def eject(llm: nn.Module) -> None:
    """Undo `inject`: the modules get their own classes back."""
    for module in list(llm.modules()):
        if unswap(module, _PerceptualLayer):
            for types in SHARING_INPUT:
                module._modules.pop(_group_name(types), None)
        for mixin in (_PerceptualModule, _GroupedProjection):
            unswap(module, mixin)


def compile_forward(layer: nn.Module, **options: Any) -> None:
    """Run a decoder layer's forward through `torch.compile`, injected or not.

    What the layer adds is an argument of the compiled part: the compiler would tie its code to the number of one layer,
    and to the sizes of tensors found in a module.

    Args:
        options: Those of `torch.compile`.
    """
    name = "_perceptual_forward" if isinstance(layer, _PerceptualLayer) else "forward"
    setattr(layer, name, torch.compile(getattr(layer, name), **options))


@contextmanager
def pinned(llm: nn.Module, weights: PerceptualWeights | None) -> Iterator[None]:
    """Use `weights` in every forward inside the block: for `generate`, which refuses keywords it does not know.

    Only without gradients: recomputation after the block would no longer find them.
    """
    states = [layer._perceptual_state for layer in decoder_layers(llm) if isinstance(layer, _PerceptualLayer)]
    for state in states:
        state.pinned = weights
    try:
        yield
    finally:
        for state in states:
            state.pinned = None
