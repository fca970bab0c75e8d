"""FLOPs of a training step, and model FLOPs utilisation (MFU).

2 FLOPs per multiply-add. Counted: every matrix product of the mathematics, on the tokens that are really there; not
counted: padding, recomputation by gradient checkpointing, norms, softmax (the convention of PaLM, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model.connectors import QFormer, TokenConnector, VLoRAConnector
from model.generator.placement import decoder_layers
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel

# Dense bf16 peak of the tensor cores, FLOP/s, from NVIDIA's data sheets.
_PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A800": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward, per part."""

    vision: float
    connector: float
    llm: float
    deltas: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.vision + self.connector + self.llm + self.deltas


class FlopCounter:
    """Counts a step from its numbers of tokens; made from the model's own shapes, partitioned or not."""

    def __init__(self, model: VisionLanguageModel, features_cached: bool) -> None:
        llm, config = model.llm, model.llm.config.get_text_config()
        layers = decoder_layers(llm)
        self._linear = [_linear_size(layer) for layer in layers]
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._attention_width = heads * head_dim
        head = llm.get_output_embeddings()
        self._head = head.in_features * head.out_features
        self._llm_trained = any(p.requires_grad for p in llm.parameters())
        self._visual_tokens = model.connector.visual_tokens
        self._first_layer = model.placement.layers[0] if model.placement else 0
        self._delta = (
            sum(2 * (s.d_in + s.d_out) * model.connector.generator.config.rank for s in model.placement.sites)
            if model.placement
            else 0
        )
        self._vision = 0 if features_cached or model.vision is None else _vision_flops(model.vision)
        vision_trained = model.vision is not None and any(p.requires_grad for p in model.vision.parameters())
        self._vision_passes = 3 if vision_trained else 1
        self._connector = _connector_flops(model.connector)

    def step(self, rows: int, text_tokens: int, targets: int, images: int) -> StepFlops:
        """FLOPs of one optimizer step over all ranks.

        Args:
            rows: Text rows.
            text_tokens: Their tokens, padding not counted.
            targets: Supervised tokens (only those reach the vocabulary head).
            images: Images (not dummies).
        """
        tokens = text_tokens + self._visual_tokens * rows
        context = tokens / max(1, rows)
        llm = 0.0
        for index, linear in enumerate(self._linear):
            forward = 2 * linear * tokens + 4 * context * self._attention_width * tokens
            # A frozen LLM needs the gradient of its inputs only, and only above the first placed layer.
            passes = 3 if self._llm_trained else 2 if index >= self._first_layer else 1
            llm += passes * forward
        llm += 2 * self._head * targets * (3 if self._llm_trained else 2)
        return StepFlops(
            vision=self._vision_passes * self._vision * images,
            connector=3 * self._connector * images,
            llm=llm,
            deltas=3 * self._delta * tokens,
        )


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK.items() if key in name), None)


def _linear_size(module: nn.Module) -> int:
    """Weights of all linear layers below `module`; read from the layers, for a partitioned weight is empty."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _vision_flops(vision: VisionEncoder) -> float:
    encoder = vision.encoder
    config = encoder.config
    patches = (vision.image_size // config.patch_size) ** 2
    tokens = patches + vision.num_prefix
    linear = _linear_size(encoder)
    patchify = 2 * patches * 3 * config.patch_size**2 * config.hidden_size
    return 2 * linear * tokens + 4 * tokens**2 * config.hidden_size * config.num_hidden_layers + patchify


def _blocks_flops(blocks: nn.ModuleList, queries: int, keys: int) -> float:
    """Decoder blocks: q, k, v, o of both attentions and the feed-forward."""
    if not blocks:
        return 0.0
    block = blocks[0]
    width, ffn = block.linear1.in_features, block.linear1.out_features
    projections = 6 * queries * width**2 + 2 * keys * width**2 + 2 * queries * width * ffn
    attention = 2 * queries * (queries + keys) * width
    return 2.0 * len(blocks) * (projections + attention)


def _connector_flops(connector: nn.Module) -> float:
    """Forward of one image."""
    if isinstance(connector, VLoRAConnector):
        keys = connector.generator.keys
        patches = keys.pos_embed.shape[0]
        total = 2.0 * patches * keys.visual_proj.weight.numel()
        for stack in connector.generator.stacks:
            total += _blocks_flops(stack.blocks, stack.queries.shape[0], patches)
            for name, head in stack.heads.items():
                sites = sum(len(group) for group in stack.groups if str(group[0].d_in) == name)
                total += 2.0 * sites * head.weight.numel()
        return total
    assert isinstance(connector, TokenConnector)
    projector = connector.projector
    if isinstance(projector, QFormer):
        patches, queries = projector.pos_embed.shape[0], projector.queries.shape[0]
        blocks = _blocks_flops(projector.blocks, queries, patches)
        return 2.0 * (patches * projector.visual_proj.weight.numel() + queries * projector.out.weight.numel()) + blocks
    return 2.0 * _linear_size(projector) * connector.visual_tokens
