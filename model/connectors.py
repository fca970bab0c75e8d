"""How an image reaches the language model: through its weights, or as visual tokens in its input.

All connectors read the same features and return a `Conditioning`; the rest of the model and the whole of training do
not know which one is in use.

Shapes: I images, S samples, P patches, V features, D hidden width of the LLM, N visual tokens per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.generator.generator import PerceptualWeightsGenerator
from model.generator.placement import Placement
from model.generator.weights import PerceptualWeights


@dataclass(frozen=True)
class Conditioning:
    """What a connector hands to the language model; exactly one of the two is set.

    Attributes:
        weights: Deltas for the LLM's projections.
        tokens: Visual tokens [S, M, D] for the LLM's input, with `token_mask` int64 [S, M] (0: padding of samples
            with fewer images than others).
    """

    weights: PerceptualWeights | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None


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
    """The interface: `forward(features [I, P, V], image_to_sample [I], image_weight [I], n_samples) -> Conditioning`.

    Attributes:
        norm: `FeatureNorm` applied first, or None.
        visual_tokens: Visual tokens that one image puts into the LLM's input.
    """

    visual_tokens: int

    def __init__(self, normalize: bool, feature_width: int) -> None:
        super().__init__()
        self.norm = FeatureNorm(feature_width) if normalize else None

    def normalized(self, features: Tensor) -> Tensor:
        """Features as the connector's own layers see them."""
        return features if self.norm is None else self.norm(features)


class VLoRAConnector(Connector):
    """Parameter space: the image becomes low-rank deltas; no visual token."""

    visual_tokens = 0

    def __init__(self, config: ModelConfig, placement: Placement, num_patches: int, feature_width: int) -> None:
        super().__init__(_normalize(config), feature_width)
        self.generator = PerceptualWeightsGenerator(config.generator, placement, num_patches, feature_width)

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """See `Connector`."""
        features = self.normalized(features)
        return Conditioning(weights=self.generator(features, image_to_sample, image_weight, n_samples))


class TokenConnector(Connector):
    """Input space: N tokens per image, in the order of a sample's images, in front of the text.

    Args:
        projector: Module that maps features [I, P, V] to tokens [I, N, D].
        visual_tokens: N.
    """

    def __init__(self, config: ModelConfig, feature_width: int, projector: nn.Module, visual_tokens: int) -> None:
        super().__init__(_normalize(config), feature_width)
        self.projector, self.visual_tokens = projector, visual_tokens

    def forward(self, features: Tensor, image_to_sample: Tensor, image_weight: Tensor, n_samples: int) -> Conditioning:
        """See `Connector`. The dummy of a batch without images adds zero times its tokens, so that the projector
        still gets a (zero) gradient on every rank."""
        tokens = self.projector(self.normalized(features))
        real = image_weight > 0
        counts = torch.bincount(image_to_sample[real], minlength=n_samples)
        slots = int(counts.max()) if real.any() else 0
        if slots == 0:
            out = (tokens * 0).sum().expand(n_samples, 1, tokens.shape[-1])
            return Conditioning(tokens=out, token_mask=image_to_sample.new_zeros(n_samples, 1))
        # The how-manieth image of its sample each image is; a sample's images stand in order.
        order = torch.cat([torch.arange(int(n), device=counts.device) for n in counts])
        n, width = tokens.shape[1:]
        out = tokens.new_zeros(n_samples, slots, n, width)
        out = out.index_put((image_to_sample[real], order), tokens[real])
        mask = (torch.arange(slots, device=counts.device) < counts[:, None]).long()
        return Conditioning(tokens=out.view(n_samples, slots * n, width), token_mask=mask.repeat_interleave(n, 1))


class MLPProjector(nn.Sequential):
    """LLaVA-v1.5's projector: Linear, GELU, Linear on every patch."""

    def __init__(self, feature_width: int, hidden_size: int) -> None:
        super().__init__(nn.Linear(feature_width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))


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
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, connector.num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(connector.num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, V] -> [I, num_queries, D]."""
        keys = self.visual_proj(features) + self.pos_embed
        hidden = self.queries.expand(features.shape[0], -1, -1)
        for block in self.blocks:
            hidden = block(hidden, keys)
        return self.out(self.norm(hidden))


def _normalize(config: ModelConfig) -> bool:
    chosen = config.connector.normalize_features
    return config.generator.init == "stable" if chosen is None else chosen


def visual_tokens(config: ModelConfig, num_patches: int) -> int:
    """Visual tokens that one image puts into the LLM's input."""
    return {"mlp": num_patches, "qformer": config.connector.num_queries}.get(config.connector.name, 0)


def build_connector(
    config: ModelConfig, placement: Placement | None, num_patches: int, feature_width: int, hidden_size: int
) -> Connector:
    """The connector named in `config.connector.name`.

    Raises:
        ValueError: an unknown name.
    """
    tokens = visual_tokens(config, num_patches)
    match config.connector.name:
        case "vlora":
            if placement is None:
                raise ValueError("connector.name=vlora needs a placement")
            return VLoRAConnector(config, placement, num_patches, feature_width)
        case "mlp":
            return TokenConnector(config, feature_width, MLPProjector(feature_width, hidden_size), tokens)
        case "qformer":
            projector = QFormer(config, num_patches, feature_width, hidden_size)
            return TokenConnector(config, feature_width, projector, tokens)
        case other:
            raise ValueError(f"connector.name={other!r}: choose vlora, mlp or qformer")
