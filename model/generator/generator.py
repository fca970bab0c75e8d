"""The perceptual weights generator: image features -> one low-rank delta per placed projection.

Paper "Visual Perception by Large Language Model's Weights" (NeurIPS 2024), Figure 3, with the details of the released
code: learned queries pass N pre-norm decoder blocks (self-attention, cross-attention to the image, feed-forward), a
LayerNorm and one linear head per type turn each query into the input-side factor A [d_in, r] of one layer. The
output-side factors B [r, d_out] are learned, image-independent and zero at the start.

Shapes: I images, S samples, P patches, V features, g generator width, G layers, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.blocks import Block
from model.config import GeneratorConfig
from model.generator.image_norm import ImageNorm
from model.generator.placement import Placement, Site
from model.generator.weights import PerceptualWeights
from model.ops import split_perceptual

_EPS = 1e-5


def sum_by_sample(x: Tensor, image_to_sample: Tensor, weight: Tensor, n_samples: int) -> Tensor:
    """Weighted sum of per-image rows [I, ...] into [S, ...]; a sample without images gets zeros."""
    x = x * weight.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x.new_zeros(n_samples, *x.shape[1:]).index_add(0, image_to_sample, x)


class Head(nn.Linear):
    """Linear head that sums over a sample's images before it multiplies.

    A is linear in the head's input, so the sum of A over images is the head of the summed inputs, with the bias once
    per image. A sample without images gets exactly zero.
    """

    def forward(self, hidden: Tensor, count: Tensor) -> Tensor:
        """hidden [S, G, g] summed over images, count [S] images -> [S, G, d_in * r]."""
        out = nn.functional.linear(hidden, self.weight)
        return out + count.to(out.dtype).view(-1, 1, 1) * self.bias


class KeyProjection(nn.Module):
    """Image features -> keys and values of the cross-attention, with a learned position per patch."""

    def __init__(self, feature_width: int, num_patches: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.visual_proj = nn.Linear(feature_width, config.width)
        self.pos_embed = nn.Parameter(torch.empty(num_patches, config.width))
        # The released generator does not normalise its keys.
        self.norm = nn.LayerNorm(config.width, eps=_EPS) if config.init == "stable" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, V] -> [I, P, g]."""
        return self.norm(self.visual_proj(features) + self.pos_embed)


class OutputFactors(nn.Module):
    """The learned factors B of one type, [G, r, d_out]: image-independent, zero at the start so that dW = 0."""

    def __init__(self, sites: tuple[Site, ...], rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(sites), rank, sites[0].d_out))

    def forward(self) -> tuple[Tensor, ...]:
        """One [r, d_out] per layer."""
        # A copy: ZeRO-3 takes the parameter away when this module returns, but the decoder reads it much later.
        return self.weight.clone().unbind(0)


class Stack(nn.Module):
    """Queries, blocks and heads for the sites of one type (or of all types, when the generator is `shared`)."""

    def __init__(self, config: GeneratorConfig, groups: list[tuple[Site, ...]]) -> None:
        super().__init__()
        self.groups, self.rank = groups, config.rank
        self.queries = nn.Parameter(torch.empty(sum(map(len, groups)), config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads, int(config.width * config.ffn_ratio))
            for _ in range(config.num_blocks)
        )
        self.norm = nn.LayerNorm(config.width, eps=_EPS)
        self.image_norm = ImageNorm(tuple(self.queries.shape)) if config.image_norm else None
        # One head per input width: types of one width share it (the released code knows a single width).
        widths = sorted({group[0].d_in for group in groups})
        self.heads = nn.ModuleDict({str(d): Head(config.width, d * config.rank) for d in widths})

    def forward(self, keys: Tensor, image_to_sample: Tensor, weight: Tensor, n_samples: int) -> tuple[Tensor, ...]:
        """keys [I, P, g] -> A [S, d_in, r] of every site of `groups`, in order."""
        hidden = self.queries.expand(keys.shape[0], -1, -1)
        for block in self.blocks:
            hidden = block(hidden, keys)
        hidden = self.norm(hidden)
        if self.image_norm is not None:
            hidden = self.image_norm(hidden, weight)
        hidden = sum_by_sample(hidden, image_to_sample, weight, n_samples)
        count = weight.new_zeros(n_samples).index_add(0, image_to_sample, weight)
        factors: dict[Site, Tensor] = {}
        hidden_by_group = hidden.split([len(group) for group in self.groups], dim=1)
        for name, head in self.heads.items():
            chosen = [i for i, group in enumerate(self.groups) if str(group[0].d_in) == name]
            out = head(torch.cat([hidden_by_group[i] for i in chosen], dim=1), count)
            sites = [site for i in chosen for site in self.groups[i]]
            out = out.view(n_samples, len(sites), -1, self.rank)
            factors.update(zip(sites, split_perceptual(out), strict=True))
        # A plain tuple: ZeRO-3 looks for tensors in a module's output to know when its backward begins.
        return tuple(factors[site] for group in self.groups for site in group)


class PerceptualWeightsGenerator(nn.Module):
    """features [I, P, V] -> `PerceptualWeights` of S samples.

    Args:
        config: Sizes and initialisation.
        placement: Where the deltas go.
        num_patches: P, positions the encoder returns for one image.
        feature_width: V.

    Raises:
        ValueError: width not divisible by the heads, or an unknown `init`.
    """

    def __init__(self, config: GeneratorConfig, placement: Placement, num_patches: int, feature_width: int) -> None:
        super().__init__()
        if config.width % config.num_heads:
            raise ValueError(
                f"generator.width={config.width} is not divisible by generator.num_heads={config.num_heads}"
            )
        if config.init not in ("paper", "stable"):
            raise ValueError(f"generator.init={config.init!r}: choose 'paper' or 'stable'")
        self.config, self.placement = config, placement
        self.scale = (config.rank if config.alpha is None else config.alpha) / config.rank
        self.keys = KeyProjection(feature_width, num_patches, config)
        by_type = [placement.of_type(t) for t in placement.types]
        groups = [by_type] if config.shared else [[sites] for sites in by_type]
        self.stacks = nn.ModuleList(Stack(config, group) for group in groups)
        self.output_factors = nn.ModuleDict(
            {t: OutputFactors(sites, config.rank) for t, sites in zip(placement.types, by_type, strict=True)}
        )
        self._init_paper() if config.init == "paper" else self._init_stable()

    def _init_paper(self) -> None:
        """As released: its init hook reaches Linear and LayerNorm only, so queries and positions stay N(0, 1) and the
        attention's input projections stay PyTorch's Xavier (`mm_projector` of FeipengMa6/VLoRA).
        """
        nn.init.normal_(self.keys.pos_embed)
        for stack in self.stacks:
            nn.init.normal_(stack.queries)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _init_stable(self) -> None:
        """Image-dependent from step 0: with unit-size queries the cross-attention output drowns and every image gets
        nearly the same A (share 0.02 against 0.8 here). Each column of A starts with unit-order x A.
        """
        nn.init.normal_(self.keys.pos_embed, std=0.02)
        for stack in self.stacks:
            nn.init.normal_(stack.queries, std=0.1)
            for head in stack.heads.values():
                d_in = head.out_features // self.config.rank
                nn.init.normal_(head.weight, std=1 / math.sqrt(self.config.width * d_in))
                nn.init.zeros_(head.bias)

    def forward(
        self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int
    ) -> PerceptualWeights:
        """Weights for S samples.

        Args:
            features: [I, P, V].
            image_to_sample: int64 [I].
            image_weight: [I], 0 takes an image out exactly.
            n_samples: S.
        """
        keys = self.keys(features)
        a: dict[Site, Tensor] = {}
        for stack in self.stacks:
            sites = [site for group in stack.groups for site in group]
            a.update(zip(sites, stack(keys, image_to_sample, image_weight, n_samples), strict=True))
        b: dict[Site, Tensor] = {}
        for weight_type, factors in self.output_factors.items():
            b.update(zip(self.placement.of_type(weight_type), factors(), strict=True))
        return PerceptualWeights(self.placement, a, b, self.scale)
