"""The paper's model with random weights, made on the device, and batches of its shapes: no download, no data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from model.batch import Batch
from model.decoder.norms import resolve_kernels, use_kernels
from model.loading import architecture_config
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel, assemble
from train.config import DTYPES, RunConfig, resolve
from train.config.compose import compose_overrides

_TINY = (
    "llm=tiny",
    "vision=clip_l14_336",
    "vision.image_size=28",
    "generator.width=16",
    "generator.num_heads=2",
    "generator.num_blocks=1",
    "generator.rank=4",
    "engine.precision=fp32",
    "engine.overlap_comm=false",
)
_TINY_LLM = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
_TINY_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        overrides: Command-line overrides of the model.
        pretraining: Samples and text tokens of each, one row per sample.
        finetuning: The same.
        finetuned_layers: Layers of the LLM in the finetuning step: what one GPU can hold with Adam's state.
        prompt, answer: Tokens of a question and of its answer.
    """

    overrides: tuple[str, ...]
    pretraining: tuple[int, int]
    finetuning: tuple[int, int]
    finetuned_layers: int
    prompt: int
    answer: int


PAPER = Size(("experiment=vlora_7b", "data.val=null"), (96, 64), (16, 512), 8, 64, 64)
TINY = Size(_TINY, (4, 8), (2, 16), 4, 6, 3)


def size(tiny: bool) -> Size:
    """The paper's shapes, or the least that runs every line."""
    return TINY if tiny else PAPER


def configuration(tiny: bool, *overrides: str) -> RunConfig:
    """As `python -m train` would compose it, from the repository's own presets."""
    words = [*size(tiny).overrides, "tracking=disabled", "vision.cache=false", *overrides]
    config = resolve(compose_overrides(words))
    if tiny:
        config.llm.architecture, config.vision.architecture = dict(_TINY_LLM), dict(_TINY_VISION)
        config.llm.path = config.vision.path = "random/weights"
    return config


def build(config: RunConfig, device: torch.device) -> VisionLanguageModel:
    """The configured model with random weights on `device`."""
    dtype, model = DTYPES[config.engine.precision], config.model
    attention = model.llm.attn_implementation
    torch.manual_seed(0)
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(
            architecture_config(model.llm.architecture or {}), dtype=dtype, attn_implementation=attention
        )
        encoder = AutoModel.from_config(architecture_config(model.vision.architecture or {}), dtype=dtype)
    llm.config.use_cache = False
    built = connected(config, VisionEncoder(encoder, model.vision), llm, device)
    use_kernels(llm, resolve_kernels(model.llm.kernels, device.type == "cuda"))
    if built.placement is not None:  # B is zero at the start; a zero product would be an easy one
        for factors in built.connector.generator.output_factors.values():
            torch.nn.init.normal_(factors.weight, std=0.02)
    return built


def connected(
    config: RunConfig, vision: VisionEncoder, llm: PreTrainedModel, device: torch.device
) -> VisionLanguageModel:
    """A fresh connector of the configured kind between parts that are there."""
    with torch.device(device):
        model = assemble(config.model, llm, vision)
    for parameter in model.connector.parameters():  # not its statistics
        parameter.data = parameter.data.to(DTYPES[config.engine.precision])
    return model


def batch(config: RunConfig, samples: int, length: int, device: torch.device, prompts: bool = False) -> Batch:
    """One image and one row of random tokens per sample; every token but the first is a target, or none (`prompts`)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = (config.llm.architecture or {})["vocab_size"]
    pixels = config.model.vision.image_size
    ids = torch.randint(3, vocabulary, (samples, length), generator=generator)
    owner = torch.arange(samples)
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.full_like(ids, -100) if prompts else ids.clone(),
        row_to_sample=owner,
        images=images,
        image_to_sample=owner,
        image_weight=torch.ones(samples),
        n_samples=samples,
    ).to(device, DTYPES[config.engine.precision])


def cut(config: RunConfig, layers: int) -> RunConfig:
    """The same with an LLM of only `layers` layers."""
    llm = replace(config.llm, architecture={**(config.llm.architecture or {}), "num_hidden_layers": layers})
    return replace(config, llm=llm)
