"""One sample's perceptual weights folded into the language model itself, and taken out again exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from model.decoder.injection import pinned, without_deltas
from model.generator.placement import Site, decoder_layers
from model.generator.weights import PerceptualWeights
from model.ops import MERGEABLE, Merged, MergeError, Placed, merge_, merge_errors, restore_
from model.ops.merge import WHY_NOT_M


@dataclass(frozen=True)
class MergeReport:
    """What rounding the sum to the weights' dtype costs, measured on every merged matrix.

    Attributes:
        dtype: Of the merged weights.
        sites: Size and loss of each merged update. In bf16 the loss is about 1.7e-3 / size.
        branches: Types that were not merged and run as branches.
    """

    dtype: torch.dtype
    sites: dict[Site, MergeError]
    branches: tuple[str, ...]

    def loss(self, weight_type: str) -> float:
        """Share of the update that rounding replaced by noise, over all layers of one type: |error| / |dW|."""
        found = [e for site, e in self.sites.items() if site.type == weight_type]
        total = sum(e.norm**2 for e in found)
        return math.sqrt(sum((e.error * e.norm) ** 2 for e in found) / total) if total else 0.0

    def size(self, weight_type: str) -> float:
        """|dW| / |W| of one type, mean over its layers."""
        found = [e.size for site, e in self.sites.items() if site.type == weight_type]
        return sum(found) / len(found)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        lines = [f"merged into {name} weights:", f"  {'type':<6}{'matrices':>9}{'|dW| / |W|':>12}{'dW lost':>10}"]
        for weight_type in dict.fromkeys(site.type for site in self.sites):
            count = sum(site.type == weight_type for site in self.sites)
            size, loss = self.size(weight_type), self.loss(weight_type)
            lines.append(f"  {weight_type:<6}{count:>9}{size:>12.2e}{loss:>10.2%}")
        for weight_type in self.branches:
            lines.append(f"  {weight_type:<6} runs as a branch" + (f": {WHY_NOT_M}" if weight_type == "m" else ""))
        return "\n".join(lines)


@contextmanager
def merged(
    llm: nn.Module, weights: PerceptualWeights, sample: int, types: tuple[str, ...] | None = None
) -> Iterator[MergeReport]:
    """Inside the block the model's own weights hold one sample's deltas; after it they are bit-identical to before.

    Merged projections, and layers with nothing else, are those of the plain LLM, its classes included. Every row
    inside the block is taken to be about that sample. Without gradients, and on whole weights (not under ZeRO-3). Costs
    a second copy of the merged matrices.

    Args:
        llm: A model that `model.decoder.injection.inject` has prepared.
        weights: Of any number of samples.
        sample: The one to merge.
        types: What to merge; None: whatever can be. The others run as branches.

    Yields:
        The loss by rounding, measured.

    Raises:
        ValueError: a type that cannot be merged (`m`) or was not placed.
    """
    placed_types = weights.placement.types
    for weight_type in types or ():
        if weight_type not in placed_types:
            raise ValueError(f"type {weight_type!r} cannot be merged: placed are {', '.join(placed_types)}")
        if weight_type not in MERGEABLE:
            raise ValueError(
                f"type {weight_type!r} cannot be merged: {WHY_NOT_M}; leave it out and it runs as a branch"
            )
    chosen = [t for t in placed_types if t in (MERGEABLE if types is None else types)]
    one = weights.select(torch.tensor([sample], device=next(iter(weights.a.values())).device))
    layers = decoder_layers(llm)
    sites = [site for t in chosen for site in weights.placement.of_type(t)]
    matrices = [
        Placed(s.type, layers[s.layer].get_submodule(s.module).weight, one.a[s][0].detach(), one.b[s].detach())
        for s in sites
    ]
    branches = tuple(t for t in placed_types if t not in chosen)
    merge: Merged = merge_(matrices, weights.scale)
    try:
        errors = dict(zip(sites, merge_errors(merge, matrices, weights.scale), strict=True))
        with (
            pinned(llm, one.of_types(branches) if branches else None),
            without_deltas(llm, weights.placement.only(chosen)),
        ):
            yield MergeReport(next(llm.parameters()).dtype, errors, branches)
    finally:
        restore_(merge)
