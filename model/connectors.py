"""How an image reaches the language model: through its weights, or as visual tokens in its input.

All connectors read the same features and return a `Conditioning`; the rest of the model and the whole of training do
not know which one is in use.

Shapes: I images, S samples, P patches, V features, D hidden width of the LLM, N visual tokens per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.settings import one_of
from model.batch import Batch
from model.blocks import Block
from model.config import ModelConfig
from model.decoder.cross_attention import GatedCrossAttention, VisualContext, attach_blocks
from model.decoder.injection import inject
from model.flops import blocks_flops, linear_weights
from model.generator.generator import PerceptualWeightsGenerator
from model.generator.placement import Placement, decoder_layers, place, placed_layers
from model.generator.weights import PerceptualWeights


@dataclass(frozen=True)
class Conditioning:
    """What a connector hands to the language model; exactly one of the three is set.

    Attributes:
        weights: Deltas for the LLM's projections.
        tokens: Visual tokens [I, N, D] of every image, for the LLM's input.
        context: Features of every image, for cross-attention inside the decoder.
    """

    weights: PerceptualWeights | None = None
    tokens: Tensor | None = None
    context: VisualContext | None = None

    def rows(self, batch: Batch) -> Tensor:
        """Visual tokens of every text row [R, M, D], those of its sample's images in order; 0 where there is none."""
        assert self.tokens is not None
        images = images_of_rows(batch)
        index = torch.tensor([[max(image, 0) for image in row] for row in images], device=self.tokens.device)
        real = torch.tensor([[image >= 0 for image in row] for row in images], device=self.tokens.device)
        return (self.tokens[index] * real[..., None, None].to(self.tokens.dtype)).flatten(1, 2)

    def layout(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """How visual tokens and text of each row stand among each other, and which of them are there.

        Visual tokens stand in front of the text token that `batch.image_at` names, those that a row lacks in front of
        all: a row's tokens follow each other without a gap (LLaVA's `prepare_inputs_labels_for_multimodal`).

        Returns:
            Order, int64 [R, M + L]: the entry of (visual tokens, text) at each position; and mask, int64 [R, M + L].
        """
        assert self.tokens is not None
        device = batch.input_ids.device
        real = torch.tensor([[image >= 0 for image in row] for row in images_of_rows(batch)], device=device)
        length = batch.input_ids.shape[1]
        at = torch.zeros(real.shape, dtype=torch.int64, device=device)
        if batch.image_at is not None:
            at[:, : batch.image_at.shape[1]] = batch.image_at
        # Twice the column, so that a visual token sorts between two text tokens.
        visual = torch.where(real, 2 * at - 1, -2).repeat_interleave(self.tokens.shape[1], 1)
        text = 2 * torch.arange(length, device=device).expand(len(visual), -1)
        order = torch.cat([visual, text], dim=1).argsort(dim=1, stable=True)
        there = real.long().repeat_interleave(self.tokens.shape[1], 1)
        return order, torch.cat([there, batch.attention_mask], dim=1).gather(1, order)


def images_of_rows(batch: Batch) -> list[list[int]]:
    """Numbers of the images of every text row's sample, filled up with -1 to one length, which is at least 1.

    The dummy of a batch without images is nobody's: its tokens enter times zero, so that the projector still gets a
    (zero) gradient on every rank.
    """
    of_sample: dict[int, list[int]] = {}
    for image, (sample, weight) in enumerate(
        zip(batch.image_to_sample.tolist(), batch.image_weight.tolist(), strict=True)
    ):
        if weight > 0:
            of_sample.setdefault(sample, []).append(image)
    slots = max(1, *map(len, of_sample.values())) if of_sample else 1
    rows = [of_sample.get(sample, []) for sample in batch.row_to_sample.tolist()]
    return [row + [-1] * (slots - len(row)) for row in rows]


class FeatureNorm(nn.Module):
    """Standardises each feature channel with statistics of the training images.

    The buffers are part of the connector's weights; `measured` tells whether they were ever filled.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Fill in mean and deviation, both [V] fp32."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-6))
        self.measured.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, V] -> [I, P, V], arithmetic in fp32."""
        return ((features.float() - self.mean.float()) / self.std.float()).to(features.dtype)


class Connector(nn.Module):
    """The interface. Everything that the rest of the project asks of a connector is asked here.

    Attributes:
        reads: Groups of the configuration that its shapes follow from.
        makes_weights: Whether it turns an image into `PerceptualWeights`.
        norm: `FeatureNorm` applied first, or None.
        placement: Where it adds deltas to the LLM's projections, or None.
        visual_tokens: Visual tokens that one image puts into the LLM's input.
        first_layer: The first decoder layer that the image changes: a frozen LLM is run backwards down to there.
    """

    reads: ClassVar[tuple[str, ...]] = ("connector", "generator")
    makes_weights: ClassVar[bool] = False
    placement: Placement | None = None
    visual_tokens: int = 0
    first_layer: int = 0

    def __init__(self, config: ModelConfig, feature_width: int) -> None:
        super().__init__()
        chosen = config.connector.normalize_features
        normalize = config.generator.init == "stable" if chosen is None else chosen
        self.norm = FeatureNorm(feature_width) if normalize else None

    @classmethod
    def build(cls, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> Self:
        """The connector for features [I, num_patches, feature_width] and this LLM, which stays as it is.

        Raises:
            ValueError: the configuration does not fit the parts.
        """
        raise NotImplementedError

    @classmethod
    def tokens_per_image(cls, config: ModelConfig, num_patches: int) -> int:
        """`visual_tokens` of a connector of this kind, before it is built."""
        return 0

    def attach(self, llm: PreTrainedModel) -> None:
        """Make the LLM take what this connector makes. Once, before the first forward."""

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """Features to conditioning.

        Args:
            features: [I, P, V].
            image_to_sample: int64 [I].
            image_weight: [I]; 0 for the dummy of a batch without images.
            n_samples: S.
        """
        raise NotImplementedError

    def flops(self) -> float:
        """Of one image's forward."""
        raise NotImplementedError

    def decoder_flops(self) -> float:
        """That the decoder spends more on every token of its input, because of this connector."""
        return 0.0

    def describe(self) -> list[str]:
        """Lines for the model's table: how the image gets into the LLM."""
        return [f"{self.visual_tokens} visual tokens per image in the LLM's input"]

    def normalized(self, features: Tensor) -> Tensor:
        """Features as the connector's own layers see them."""
        return features if self.norm is None else self.norm(features)


class VLoRAConnector(Connector):
    """Parameter space: the image becomes low-rank deltas; no visual token."""

    makes_weights = True

    def __init__(self, config: ModelConfig, placement: Placement, num_patches: int, feature_width: int) -> None:
        super().__init__(config, feature_width)
        self.placement, self.first_layer = placement, placement.layers[0]
        self.generator = PerceptualWeightsGenerator(config.generator, placement, num_patches, feature_width)

    @classmethod
    def build(cls, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> Self:
        """See `Connector`."""
        return cls(config, place(llm, config.generator), num_patches, feature_width)

    def attach(self, llm: PreTrainedModel) -> None:
        """See `Connector`."""
        assert self.placement is not None
        inject(llm, self.placement)

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """See `Connector`."""
        features = self.normalized(features)
        return Conditioning(weights=self.generator(features, image_to_sample, image_weight, n_samples))

    def flops(self) -> float:
        """See `Connector`."""
        keys = self.generator.keys
        patches = keys.pos_embed.shape[0]
        total = 2.0 * patches * linear_weights(keys.visual_proj)
        for stack in self.generator.stacks:
            total += blocks_flops(stack.blocks, stack.queries.shape[0], patches)
            for name, head in stack.heads.items():
                sites = sum(len(group) for group in stack.groups if str(group[0].d_in) == name)
                total += 2.0 * sites * head.weight.numel()
        return total

    def decoder_flops(self) -> float:
        """See `Connector`."""
        assert self.placement is not None
        return sum(2.0 * (site.d_in + site.d_out) * self.generator.config.rank for site in self.placement.sites)

    def describe(self) -> list[str]:
        """See `Connector`."""
        assert self.placement is not None
        layers = ", ".join(map(str, self.placement.layers))
        lines = [f"deltas of rank {self.generator.config.rank} in layers {layers} (0-based):"]
        for weight_type in self.placement.types:
            site = self.placement.of_type(weight_type)[0]
            lines.append(f"  {weight_type:<5}{site.module:<20}{site.d_in:>6} -> {site.d_out}")
        return lines


class TokenConnector(Connector):
    """Input space: N tokens per image, at the image's place in the text (`Batch.image_at`).

    Attributes:
        projector: Module that maps features [I, P, V] to tokens [I, N, D].
    """

    projector: nn.Module

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """See `Connector`."""
        return Conditioning(tokens=self.projector(self.normalized(features)))


class MLPProjector(nn.Sequential):
    """LLaVA-v1.5's projector: Linear, GELU, Linear on every patch."""

    def __init__(self, feature_width: int, hidden_size: int) -> None:
        super().__init__(nn.Linear(feature_width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


class MLPConnector(TokenConnector):
    """LLaVA-v1.5: every patch becomes a visual token, through a two-layer MLP."""

    reads = ("connector",)

    def __init__(self, config: ModelConfig, num_patches: int, feature_width: int, hidden_size: int) -> None:
        super().__init__(config, feature_width)
        self.projector, self.visual_tokens = MLPProjector(feature_width, hidden_size), num_patches

    @classmethod
    def build(cls, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> Self:
        """See `Connector`."""
        return cls(config, num_patches, feature_width, _hidden_size(llm))

    @classmethod
    def tokens_per_image(cls, config: ModelConfig, num_patches: int) -> int:
        """See `Connector`."""
        return num_patches

    def flops(self) -> float:
        """See `Connector`."""
        return 2.0 * linear_weights(self.projector) * self.visual_tokens


class QFormer(nn.Module):
    """Learned queries read the patches through cross-attention and become the visual tokens (BLIP-2 style; the
    paper's LLaVA-QFormer baseline, Table 2).

    Raises:
        ValueError: width not divisible by the heads.
    """

    def __init__(self, config: ModelConfig, num_patches: int, feature_width: int, hidden_size: int) -> None:
        super().__init__()
        width, connector = config.generator.width, config.connector
        if width % connector.num_heads:
            raise ValueError(f"generator.width={width} is not divisible by connector.num_heads={connector.num_heads}")
        self.visual_proj = nn.Linear(feature_width, width)
        self.pos_embed = nn.Parameter(torch.randn(num_patches, width) * 0.02)
        self.queries = nn.Parameter(torch.randn(connector.num_queries, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, connector.num_heads, 4 * width) for _ in range(connector.num_blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, V] -> [I, num_queries, D]."""
        keys = self.visual_proj(features) + self.pos_embed
        hidden = self.queries.expand(features.shape[0], -1, -1)
        for block in self.blocks:
            hidden = block(hidden, keys)
        return self.out(self.norm(hidden))


class QFormerConnector(TokenConnector):
    """Learned queries become the visual tokens, as many for any image."""

    def __init__(self, config: ModelConfig, num_patches: int, feature_width: int, hidden_size: int) -> None:
        super().__init__(config, feature_width)
        self.projector = QFormer(config, num_patches, feature_width, hidden_size)
        self.visual_tokens = config.connector.num_queries

    @classmethod
    def build(cls, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> Self:
        """See `Connector`."""
        return cls(config, num_patches, feature_width, _hidden_size(llm))

    @classmethod
    def tokens_per_image(cls, config: ModelConfig, num_patches: int) -> int:
        """See `Connector`."""
        return config.connector.num_queries

    def flops(self) -> float:
        """See `Connector`."""
        former = self.projector
        patches, queries = former.pos_embed.shape[0], former.queries.shape[0]
        projections = patches * linear_weights(former.visual_proj) + queries * linear_weights(former.out)
        return 2.0 * projections + blocks_flops(former.blocks, queries, patches)


class CrossAttentionConnector(Connector):
    """Inside the decoder: some layers look at the image's features through gated cross-attention; no visual token.

    In every n-th layer, or the listed ones, as `generator.every` and `generator.layers` place deltas.
    """

    def __init__(self, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> None:
        super().__init__(config, feature_width)
        text = llm.config.get_text_config()
        layers = placed_layers(config.generator, len(decoder_layers(llm)))
        self.first_layer, self.num_patches = layers[0], num_patches
        self.features = nn.LayerNorm(feature_width)
        heads = text.num_attention_heads
        self.blocks = nn.ModuleList(
            GatedCrossAttention(layer, text.hidden_size, feature_width, heads) for layer in layers
        )

    @classmethod
    def build(cls, config: ModelConfig, llm: PreTrainedModel, num_patches: int, feature_width: int) -> Self:
        """See `Connector`."""
        return cls(config, llm, num_patches, feature_width)

    def attach(self, llm: PreTrainedModel) -> None:
        """See `Connector`."""
        attach_blocks(llm, list(self.blocks))

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """See `Connector`."""
        return Conditioning(context=VisualContext(self.features(self.normalized(features))))

    def flops(self) -> float:
        """See `Connector`."""
        return 2.0 * self.num_patches * sum(linear_weights(block.key_value) for block in self.blocks)

    def decoder_flops(self) -> float:
        """See `Connector`."""
        total = 0.0
        for block in self.blocks:
            total += 2.0 * (linear_weights(block.query) + linear_weights(block.out))
            total += 4.0 * self.num_patches * block.query.out_features
        return total

    def describe(self) -> list[str]:
        """See `Connector`."""
        layers = ", ".join(str(block.index) for block in self.blocks)
        return [f"gated cross-attention of {self.blocks[0].heads} heads in front of layers {layers} (0-based)"]


CONNECTORS: dict[str, type[Connector]] = {
    "vlora": VLoRAConnector,
    "mlp": MLPConnector,
    "qformer": QFormerConnector,
    "crossattn": CrossAttentionConnector,
}
"""By `connector.name`. One more needs its class, its line here and its `conf/connector/NAME.yaml`."""


def connector_class(config: ModelConfig) -> type[Connector]:
    """The class of `config.connector.name`.

    Raises:
        ConfigError: no connector of that name.
    """
    one_of("connector.name", config.connector.name, tuple(CONNECTORS))
    return CONNECTORS[config.connector.name]


def _hidden_size(llm: PreTrainedModel) -> int:
    return llm.config.get_text_config().hidden_size
