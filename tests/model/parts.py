"""Tiny random models for the tests: real architectures, real forward passes, made in milliseconds."""

from __future__ import annotations

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.batch import Batch
from model.config import ConnectorConfig, GeneratorConfig, ModelConfig, VisionConfig
from model.connectors import build_connector
from model.decoder.injection import inject
from model.generator.placement import place
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


def vision() -> torch.nn.Module:
    """A random DINOv2 for 28-pixel images: 4 patches of width 24."""
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    return AutoModel.from_config(config).eval()


def config(connector: str = "vlora", **generator: object) -> ModelConfig:
    """A small model configuration."""
    sizes: dict = {"num_blocks": 1, "width": 16, "num_heads": 2, "rank": 4, "every": 2} | generator
    return ModelConfig(
        vision=VisionConfig(path="-", layer=-1),
        generator=GeneratorConfig(**sizes),
        connector=ConnectorConfig(name=connector, num_queries=3, num_heads=2, num_blocks=1),
    )


def build(model_config: ModelConfig, llm: str = "llama-gqa", seed: int = 0) -> VisionLanguageModel:
    """A whole tiny model whose deltas are not zero."""
    torch.manual_seed(seed)
    language, encoder = decoder(llm), VisionEncoder(vision(), model_config.vision)
    placement = place(language, model_config.generator) if model_config.connector.name == "vlora" else None
    connector = build_connector(model_config, placement, encoder.num_patches, encoder.feature_width, 32)
    if placement is not None:
        inject(language, placement)
        for factors in connector.generator.output_factors.values():
            torch.nn.init.normal_(factors.weight, std=0.3)
    return VisionLanguageModel(encoder, connector, language, placement)


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
