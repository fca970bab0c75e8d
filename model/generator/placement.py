"""Where deltas go: which layers, which projections, and how wide those are in this particular decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from model.config import GeneratorConfig, parse_types

# The names that Hugging Face decoders give to the projections. Phi calls `o` dense and has no gated MLP.
_SUFFIXES = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj", "self_attn.dense", "self_attn.out_proj"),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj", "mlp.fc1"),
    "down": ("mlp.down_proj", "mlp.fc2"),
    "m": ("mlp",),
}


@dataclass(frozen=True)
class Site:
    """One place a delta is added: projection `type` of decoder layer `layer`.

    Attributes:
        module: Dotted name below the decoder layer.
        d_in, d_out: Width of the projection's input and output.
    """

    layer: int
    type: str
    module: str
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        """`layer.type`, as used in logs and files."""
        return f"{self.layer}.{self.type}"


@dataclass(frozen=True)
class Placement:
    """The sites of one model, ordered by type, then layer."""

    layers: tuple[int, ...]
    types: tuple[str, ...]
    sites: tuple[Site, ...]

    def of_type(self, weight_type: str) -> tuple[Site, ...]:
        """The sites of one type, by layer."""
        return tuple(site for site in self.sites if site.type == weight_type)

    def only(self, types: Sequence[str]) -> Placement:
        """The same layers with some of the types."""
        kept = tuple(t for t in self.types if t in types)
        return Placement(self.layers, kept, tuple(site for site in self.sites if site.type in kept))


def decoder_layers(llm: nn.Module) -> nn.ModuleList:
    """The decoder layers of a Hugging Face causal LM.

    Raises:
        ValueError: the model has no `layers` list below its decoder.
    """
    decoder = llm.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(llm).__name__} keeps no decoder layers under `{type(decoder).__name__}.layers`")
    return layers


def placed_layers(config: GeneratorConfig, num_layers: int) -> tuple[int, ...]:
    """The 0-based layers that get deltas.

    `every: n` places layers n-1, 2n-1, ... as the released code does ((l + 1) % n == 0); where n does not divide the
    depth, the layers above the last of them get none. `above: s` leaves out those of the lowest s * num_layers layers.

    Raises:
        ValueError: neither of `every` and `layers`, a layer out of range, or no n-th layer at all or above `above`.
    """
    if config.layers is not None:
        layers = tuple(config.layers)
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= num_layers:
            raise ValueError(
                f"generator.layers={list(layers)}: give ascending, distinct indices from 0 to {num_layers - 1}, the "
                "layers of this LLM; or every n-th of them: generator.layers=null generator.every=4"
            )
        return layers
    if config.every is None or not 1 <= config.every <= num_layers:
        raise ValueError(
            f"generator.every={config.every}: give a number from 1 to {num_layers}, the layers of the LLM, or place "
            "them by hand: generator.every=null generator.layers=[..]"
        )
    placed = range(config.every - 1, num_layers, config.every)
    high = tuple(layer for layer in placed if layer >= config.above * num_layers)
    if not high:
        raise ValueError(
            f"generator.above={config.above}: the highest of every {config.every} layers is {placed[-1]} of "
            f"{num_layers}; lower it"
        )
    return high


def place(llm: nn.Module, config: GeneratorConfig) -> Placement:
    """Find the sites in `llm` and read their widths from its own modules, so grouped-query decoders just work.

    Raises:
        ValueError: a type this decoder does not have as a separate projection, or rank above the narrowest input.
    """
    layers = decoder_layers(llm)
    indices, types = placed_layers(config, len(layers)), parse_types(config.types)
    sites = tuple(_site(llm, layers[i], i, t) for t in types for i in indices)
    for site in sites:
        if config.rank > min(site.d_in, site.d_out):
            raise ValueError(
                f"generator.rank={config.rank} is above the width of {site.type} in layer {site.layer} "
                f"({site.d_in} -> {site.d_out}); a larger rank only adds parameters"
            )
    return Placement(indices, types, sites)


def find_projection(modules: Mapping[str, nn.Module], weight_type: str) -> str | None:
    """Name of the projection of a type among the modules of a decoder layer, or None where it has none."""
    return next((name for name in _SUFFIXES[weight_type] if name in modules), None)


def _site(llm: nn.Module, layer: nn.Module, index: int, weight_type: str) -> Site:
    modules = dict(layer.named_modules())
    name = find_projection(modules, weight_type)
    if name is None:
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        raise ValueError(
            f"generator.types: {type(llm).__name__} has no separate projection for {weight_type!r} "
            f"(looked for {', '.join(_SUFFIXES[weight_type])}; its layers have {', '.join(linears)})"
        )
    if weight_type == "m":
        width = llm.config.get_text_config().hidden_size
        return Site(index, weight_type, name, width, width)
    linear = modules[name]
    return Site(index, weight_type, name, linear.in_features, linear.out_features)
