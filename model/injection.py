"""Adds perceptual weights to any Hugging Face decoder, by module name, without forking its code.

The classes of the decoder layers and of the placed projections are swapped for subclasses of themselves: names and
parameters stay as they were, so base checkpoints load unchanged and ZeRO-3 sees ordinary modules. The weights travel
as a keyword of each decoder layer's forward, which transformers passes down from the top and captures for
recomputation, so gradient checkpointing sees the same deltas twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from model.ops import lowrank_delta, lowrank_linear
from model.placement import Placement, decoder_layers
from model.weights import PerceptualWeights


class _LayerState:
    """What the projections of one decoder layer add during the layer's forward."""

    __slots__ = ("factors", "pinned", "rows", "scale")

    def __init__(self) -> None:
        self.pinned: PerceptualWeights | None = None
        self.clear()

    def set(self, weights: PerceptualWeights, layer: int) -> None:
        self.factors, self.scale, self.rows = weights.for_layer(layer), weights.scale, weights.rows

    def clear(self) -> None:
        self.factors, self.scale, self.rows = {}, 1.0, None


class _PerceptualLayer(nn.Module):
    """Mixin in front of a decoder layer's class."""

    def forward(self, *args, perceptual_weights: PerceptualWeights | None = None, **kwargs):
        state: _LayerState = self._perceptual_state
        weights = perceptual_weights if perceptual_weights is not None else state.pinned
        if weights is not None:
            state.set(weights, self._perceptual_index)
        try:
            return super().forward(*args, **kwargs)
        finally:
            state.clear()


class _PerceptualModule(nn.Module):
    """Mixin in front of a placed projection (or MLP, for `m`): y = f(x) + s (x A) B."""

    def forward(self, x: Tensor, *args, **kwargs):
        state: _LayerState = self._perceptual_state[0]
        factors = state.factors.get(self._perceptual_type)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        if self._perceptual_fused:
            return lowrank_linear(x, self.weight, *factors, state.scale, bias=self.bias, rows=state.rows)
        return super().forward(x, *args, **kwargs) + lowrank_delta(x, *factors, state.scale, rows=state.rows)


@functools.cache
def _swapped(mixin: type, cls: type) -> type:
    # functools.cache keeps one class per decoder class: isinstance checks and class-keyed tables stay valid.
    return type(f"Perceptual{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})


def inject(llm: nn.Module, placement: Placement) -> None:
    """Make `llm` accept `perceptual_weights=` in its forward. Without it, it computes exactly what it did before.

    Raises:
        ValueError: `llm` was injected already.
    """
    for index, layer in enumerate(decoder_layers(llm)):
        if isinstance(layer, _PerceptualLayer):
            raise ValueError("perceptual weights are already injected into this model")
        state = _LayerState()
        layer._perceptual_state, layer._perceptual_index = state, index
        layer.__class__ = _swapped(_PerceptualLayer, type(layer))
        for site in placement.sites:
            if site.layer == index:
                module = layer.get_submodule(site.module)
                # In a tuple, so that nn.Module does not look into it.
                module._perceptual_state, module._perceptual_type = (state,), site.type
                # Quantised linears and the like keep their own forward; a plain one is a single op with its delta.
                module._perceptual_fused = type(module) is nn.Linear
                module.__class__ = _swapped(_PerceptualModule, type(module))


def eject(llm: nn.Module) -> None:
    """Undo `inject`: the modules get their own classes back."""
    for module in llm.modules():
        if isinstance(module, _PerceptualLayer | _PerceptualModule):
            module.__class__ = type(module).__mro__[2]
            for name in ("_perceptual_state", "_perceptual_index", "_perceptual_type", "_perceptual_fused"):
                module.__dict__.pop(name, None)


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
