"""Tiny random models for the tests: real architectures, real forward passes, made in milliseconds."""

from __future__ import annotations

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from model.batch import Batch
from model.config import ConnectorConfig, GeneratorConfig, ModelConfig, VisionConfig
from model.connectors import CrossAttentionConnector, VLoRAConnector, connector_class
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel

VOCABULARY = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODERS = {
    "llama": LlamaConfig(**_SIZES | {"num_key_value_heads": 4}),
    "llama-gqa": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=8),
    "mistral": MistralConfig(**_SIZES),
    "gemma2": Gemma2Config(**_SIZES, head_dim=8),
    "phi": PhiConfig(**_SIZES),
}


def decoder(name: str = "llama-gqa") -> torch.nn.Module:
    """A random decoder in evaluation mode."""
    return AutoModelForCausalLM.from_config(DECODERS[name]).eval()


_VISION_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_FEED_FORWARD = {"intermediate_size": 48}
ENCODERS = {
    "clip": CLIPVisionConfig(**_VISION_SIZES, **_FEED_FORWARD),
    "siglip": SiglipVisionConfig(**_VISION_SIZES, **_FEED_FORWARD),  # and SigLIP 2 at a fixed resolution
    "dinov2": Dinov2Config(**_VISION_SIZES),
    "dinov2-registers": Dinov2WithRegistersConfig(**_VISION_SIZES, num_register_tokens=2),
    "dinov3": DINOv3ViTConfig(**_VISION_SIZES, **_FEED_FORWARD, num_register_tokens=2),
}


def vision(name: str = "dinov2") -> torch.nn.Module:
    """A random encoder of 28-pixel images: 4 patches of width 24."""
    return AutoModel.from_config(ENCODERS[name]).eval()


def config(connector: str = "vlora", **generator: object) -> ModelConfig:
    """A small model configuration."""
    sizes: dict = {"num_blocks": 1, "width": 16, "num_heads": 2, "rank": 4, "every": 2} | generator
    return ModelConfig(
        vision=VisionConfig(path="-", layer=-1),
        generator=GeneratorConfig(**sizes),
        connector=ConnectorConfig(name=connector, num_queries=3, num_heads=2, num_blocks=1),
    )


def build(
    model_config: ModelConfig, llm: str = "llama-gqa", seed: int = 0, encoder: str = "dinov2"
) -> VisionLanguageModel:
    """A whole tiny model whose image already counts: deltas are not zero, gates are open."""
    torch.manual_seed(seed)
    language, images = decoder(llm), VisionEncoder(vision(encoder), model_config.vision)
    connector = connector_class(model_config).build(model_config, language, images.num_patches, images.feature_width)
    if isinstance(connector, VLoRAConnector):
        for factors in connector.generator.output_factors.values():
            torch.nn.init.normal_(factors.weight, std=0.3)
    if isinstance(connector, CrossAttentionConnector):
        for block in connector.blocks:
            torch.nn.init.constant_(block.gate, 0.7)
    return VisionLanguageModel(images, connector, language)


def batch(
    rows: list[int], images: list[int], length: int = 7, seed: int = 0, image_weight: list[float] | None = None
) -> Batch:
    """A batch from the sample of each row and of each image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (len(rows), length), generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.clone(),
        row_to_sample=torch.tensor(rows),
        images=torch.randn(len(images), 3, 28, 28, generator=generator),
        image_to_sample=torch.tensor(images),
        image_weight=torch.tensor(image_weight or [1.0] * len(images)),
        n_samples=max([*rows, *images]) + 1,
    )
