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
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.decoder.swap import original, swap, unswap
from model.generator.placement import Placement, decoder_layers
from model.generator.weights import PerceptualWeights
from model.ops import Rows, Segments, inference, lowrank_delta, lowrank_linear, lowrank_linear_group
from model.ops.inference import Joined

SHARING_INPUT = (("q", "k", "v"), ("gate", "up"))
"""Types whose projections read the same tensor in every decoder we place deltas in."""


class _Added(NamedTuple):
    """What one decoder layer adds: the factors A [S, d_in, r] and B [r, d_out] by type, their scale and the rows.

    `joined`, by types that share their input, is how they are laid out where no gradient is wanted; else empty.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    rows: Rows | Segments | None
    joined: dict[tuple[str, ...], Joined]


_NOTHING = _Added({}, 1.0, None, {})


class _LayerState:
    """What the projections of decoder layer `index` add during the layer's forward.

    `together`: its placed types, those that share their input in one tuple.
    """

    __slots__ = ("added", "groups", "index", "pinned", "together")

    def __init__(self, index: int) -> None:
        self.index = index
        self.pinned: PerceptualWeights | None = None
        self.together: tuple[tuple[str, ...], ...] = ()
        self.groups: list[SharedInput] = []
        self.added = _NOTHING

    def added_by(self, weights: PerceptualWeights | None) -> _Added:
        factors = None if weights is None else weights.by_layer.get(self.index)
        if weights is None or factors is None:
            return _NOTHING
        training = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        joined = {} if training else weights.joined(self.index, self.together)
        return _Added(factors, weights.scale, weights.rows, joined)

    def clear(self) -> None:
        self.added = _NOTHING
        for group in self.groups:
            group.clear()


class SharedInput(nn.Module):
    """The placed projections of one decoder layer that read the same input, as one op.

    It owns no parameters and adds no key to the state dict. `linears` are the projections by type, `types` their types.
    """

    def __init__(self, state: _LayerState, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.linears = linears  # in a dict, so that nn.Module does not count them twice
        self.types = tuple(linears)
        self._state = state
        self._input: Tensor | None = None
        self._ready: dict[str, Tensor] = {}

    def parameters_read(self) -> list[nn.Parameter]:
        """The projections' weights and biases: external to this module, but read by its forward and backward."""
        return [p for linear in self.linears.values() for p in linear.parameters()]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every projection that has deltas now, in their order."""
        factors, scale, rows, joined = self._state.added
        types = self._types()
        linears = [self.linears[t] for t in types]
        ready = joined.get(self.types)
        if ready is not None and ready.fits(x):
            return inference.lowrank_linear_group(x, [ll.weight for ll in linears], [ll.bias for ll in linears], ready)
        a, b = zip(*(factors[t] for t in types), strict=True)
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
        factors = self._state.added.factors
        return [t for t in self.types if t in factors]

    def clear(self) -> None:
        """Drop what was not asked for."""
        self._input, self._ready = None, {}


class _PerceptualLayer(nn.Module):
    """Mixin in front of a decoder layer's class."""

    def forward(self, *args: Any, perceptual_weights: PerceptualWeights | None = None, **kwargs: Any) -> Any:
        state: _LayerState = self._perceptual_state
        weights = perceptual_weights if perceptual_weights is not None else state.pinned
        return self._perceptual_forward(state.added_by(weights), *args, **kwargs)

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
        ready = added.joined.get((self._perceptual_type,))
        if ready is not None and not ready.fits(x):
            ready = None
        if self._perceptual_fused:
            if ready is not None:
                return inference.lowrank_linear_group(x, (self.weight,), (self.bias,), ready)[0]
            return lowrank_linear(x, self.weight, *factors, added.scale, bias=self.bias, rows=added.rows)
        out = super().forward(x, *args, **kwargs)
        if ready is not None and isinstance(out, Tensor) and out is not x:
            return inference.with_delta(out, x, ready)
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


_PLACED = (_PerceptualModule, _GroupedProjection)


def inject(llm: nn.Module, placement: Placement) -> None:
    """Make `llm` accept `perceptual_weights=` in its forward. Without it, it computes exactly what it did before.

    Raises:
        ValueError: `llm` was injected already.
    """
    for index, layer in enumerate(decoder_layers(llm)):
        if isinstance(layer, _PerceptualLayer):
            raise ValueError("perceptual weights are already injected into this model")
        state = _LayerState(index)
        swap(layer, _PerceptualLayer, _perceptual_state=state)
        modules = {site.type: layer.get_submodule(site.module) for site in placement.sites if site.layer == index}
        grouped: dict[str, SharedInput] = {}
        for types in SHARING_INPUT:
            linears = {t: modules[t] for t in types if t in modules}
            if len(linears) > 1 and _one_op(linears):
                group = SharedInput(state, linears)
                layer.add_module(_group_name(types), group)
                state.groups.append(group)
                grouped |= dict.fromkeys(linears, group)
        state.together = (*(group.types for group in state.groups), *((t,) for t in modules if t not in grouped))
        for weight_type, module in modules.items():
            known: dict[str, Any] = {"_perceptual_state": state, "_perceptual_type": weight_type}
            if weight_type in grouped:
                # In a tuple, so that nn.Module does not look into it.
                swap(module, _GroupedProjection, **known, _perceptual_group=(grouped[weight_type],))
            else:
                # Quantised linears and the like keep their own forward; a plain one is a single op with its delta.
                swap(module, _PerceptualModule, **known, _perceptual_fused=type(module) is nn.Linear)


@contextmanager
def without_deltas(llm: nn.Module, placement: Placement) -> Iterator[None]:
    """Inside the block the modules of `placement`, and every decoder layer that keeps none, have their own classes.

    They then cost what they cost in a plain LLM. The others go on to take deltas.
    """
    layers = decoder_layers(llm)
    plain = {layers[site.layer].get_submodule(site.module) for site in placement.sites}
    kept = [layer for layer in layers if any(isinstance(m, _PLACED) and m not in plain for m in layer.modules())]
    with ExitStack() as stack:
        for mixin in _PLACED:
            stack.enter_context(original(plain, mixin))
        stack.enter_context(original([layer for layer in layers if layer not in kept], _PerceptualLayer))
        yield


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
        for mixin in _PLACED:
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
