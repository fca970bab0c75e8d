"""Reads the exports of runs made before the folder described itself: export.json, and the run's config.yaml."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data_prep.store.pixels import load_preprocessor
from model.config import ConnectorConfig, GeneratorConfig, LLMConfig, ModelConfig, VisionConfig
from model.loading import ModelError, fingerprint
from vlora import folder as folders
from vlora.chat_templates import chat_template
from vlora.configuration import VLoRAConfig
from vlora.processing import VLoRAImageProcessor, VLoRAProcessor

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def read_config(folder: Path) -> VLoRAConfig:
    """The configuration of RUN/export.

    Raises:
        ModelError: the run's config.yaml is missing.
    """
    record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    run = _run(folder)
    schemas = {"llm": LLMConfig, "vision": VisionConfig, "generator": GeneratorConfig, "connector": ConnectorConfig}
    model = ModelConfig(**{name: _known(schema, run[name]) for name, schema in schemas.items()})
    places = {name: {"path": run[name]["path"], "fingerprint": record["identity"][name]} for name in ("llm", "vision")}
    parts: dict[str, Any] = {name: place | {"base": None} for name, place in places.items()}
    if (folder / "llm").is_dir():
        parts["llm"] = {"path": "llm", "fingerprint": fingerprint(str(folder / "llm")), "base": places["llm"]}
    return VLoRAConfig.of(model, parts, _DTYPES[run["engine"]["precision"]])


def read_processor(folder: Path, vision: str | None = None) -> VLoRAProcessor:
    """The processor of RUN/export."""
    config, run = read_config(folder), _run(folder)
    path = folders.part_path(folder, config, "vision", vision)
    pixels = load_preprocessor(config.model_config(vision_path=path).vision)
    tokenizer = AutoTokenizer.from_pretrained(folders.part_path(folder, config, "llm"))
    template = run["data"]["template"]
    return VLoRAProcessor(VLoRAImageProcessor.of(pixels), tokenizer, template, chat_template(template, tokenizer))


def _run(folder: Path) -> dict[str, Any]:
    file = folder.parent / "config.yaml"
    if not file.is_file():
        raise ModelError(f"{file} is missing: this export is of an earlier version and needs its run directory")
    return dict(OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]


def _known(schema: type, values: dict[str, Any]) -> Any:
    names = {field.name for field in fields(schema)}
    return schema(**{key: value for key, value in values.items() if key in names})
