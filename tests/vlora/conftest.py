"""Trained models on disk, made in seconds: real formats, random weights whose deltas are not zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_prep.store.pixels import load_preprocessor
from model.config import ConnectorConfig, GeneratorConfig, LLMConfig, ModelConfig, VisionConfig
from model.loading import fingerprint
from model.vlm import build_model
from tests.train import world
from vlora import folder as folders
from vlora.chat_templates import chat_template
from vlora.configuration import VLoRAConfig
from vlora.processing import VLoRAImageProcessor, VLoRAProcessor


def make_folder(
    parts: Path,
    out: Path,
    connector: str = "vlora",
    dtype: str = "float32",
    types: str = "qkvom",
    own_llm: bool = False,
) -> Path:
    """A folder as a run exports it, of the parts that `world.make` made."""
    torch.manual_seed(3)
    settings = ModelConfig(
        LLMConfig(path=str(parts / "llm")),
        VisionConfig(path=str(parts / "vision"), layer=-1, image_size=28),
        GeneratorConfig(num_blocks=1, width=16, num_heads=2, rank=4, every=2, types=types),
        ConnectorConfig(name=connector, num_queries=3, num_heads=2, num_blocks=1),
    )
    model = build_model(settings)
    if connector == "vlora":
        for factors in model.connector.generator.output_factors.values():
            torch.nn.init.normal_(factors.weight, std=0.5)
        for stack in model.connector.generator.stacks:
            for head in stack.heads.values():
                torch.nn.init.normal_(head.weight, std=0.5)
    if connector == "crossattn":
        for block in model.connector.blocks:
            torch.nn.init.constant_(block.gate, 2.0)
            torch.nn.init.normal_(block.out.weight, std=1.0)
    records = {
        name: {"path": str(parts / name), "fingerprint": fingerprint(str(parts / name)), "base": None}
        for name in ("llm", "vision")
    }
    if own_llm:
        tuned = AutoModelForCausalLM.from_pretrained(parts / "llm", dtype=getattr(torch, dtype))
        with torch.no_grad():
            tuned.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        tuned.save_pretrained(out / "llm")
        records["llm"] = {"path": "llm", "fingerprint": fingerprint(str(out / "llm")), "base": records["llm"]}
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    pixels = VLoRAImageProcessor.of(load_preprocessor(settings.vision))
    processor = VLoRAProcessor(pixels, tokenizer, "qa", chat_template("qa", tokenizer))
    config = VLoRAConfig.of(settings, records, dtype, model.llm.config, AutoConfig.from_pretrained(parts / "vision"))
    folders.write(out, config, model.connector.state_dict(), processor, folders.generation_config(processor))
    return out


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    return world.make(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def trained(parts, tmp_path_factory) -> Path:
    """A folder with connector `vlora` in fp32 that refers to its parts."""
    return make_folder(parts, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="session")
def loaded(trained):
    """Its model and processor."""
    return folders.load(trained)


def square(color: tuple[int, int, int]) -> bytes:
    """A PNG file."""
    return world.picture(color)
