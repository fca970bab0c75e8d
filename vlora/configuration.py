"""The configuration of a trained model, in the form of transformers."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from model.config import ConnectorConfig, GeneratorConfig, LLMConfig, ModelConfig, VisionConfig
from model.loading import ModelError

_PARTS = {"text_config": "llama", "vision_config": "dinov2"}
_NOT_KEPT = {"llm": ("path", "architecture", "pack_tokens"), "vision": ("path", "architecture", "cache")}


class VLoRAConfig(PreTrainedConfig):
    """What a folder's `config.json` holds.

    Attributes:
        text_config, vision_config: Architectures of the language model and the vision encoder, as transformers
            describes them.
        llm, vision, generator, connector: The fields of the groups of `model.config` by name, but for the paths.
        parts: Where the weights of `llm` and `vision` are: `path`, relative to the folder where they are in it, else
            the folder or Hugging Face name of the model they come from, and its `fingerprint`; `base` holds path and
            fingerprint of the untrained model where the part was trained.
    """

    model_type = "vlora"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    llm: dict | None = None
    vision: dict | None = None
    generator: dict | None = None
    connector: dict | None = None
    parts: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for group in ("llm", "vision", "generator", "connector", "parts"):
            setattr(self, group, getattr(self, group) or {})
        for part, usual in _PARTS.items():  # here, as how transformers does it differs over its versions
            given = getattr(self, part)
            if not isinstance(given, PreTrainedConfig):
                given = dict(given or {})
                setattr(self, part, AutoConfig.for_model(given.pop("model_type", usual), **given))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        parts: dict[str, Any],
        dtype: str,
        text_config: PreTrainedConfig | None = None,
        vision_config: PreTrainedConfig | None = None,
    ) -> VLoRAConfig:
        """The configuration of a model that was built from `model`.

        Args:
            model: What it was built from.
            parts: See the class.
            dtype: `float32` or `bfloat16`: what it computes in.
            text_config, vision_config: Of its parts; none: known once they are loaded.
        """
        groups: dict[str, Any] = {}
        for group in ("llm", "vision", "generator", "connector"):
            kept = asdict(getattr(model, group))
            groups[group] = {key: value for key, value in kept.items() if key not in _NOT_KEPT.get(group, ())}
        if text_config is not None:
            groups["text_config"] = text_config.to_dict() | {"use_cache": True}
        if vision_config is not None:
            groups["vision_config"] = vision_config.to_dict()
        return cls(parts=parts, dtype=dtype, **groups)

    def model_config(self, llm_path: str = "-", vision_path: str = "-") -> ModelConfig:
        """As `model.vlm.build_model` reads it.

        Raises:
            ModelError: `config.json` names a setting that this version does not know.
        """
        return ModelConfig(
            self._group(LLMConfig, "llm", path=llm_path),
            self._group(VisionConfig, "vision", path=vision_path),
            self._group(GeneratorConfig, "generator"),
            self._group(ConnectorConfig, "connector"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Without the places on this machine that the parts' own configurations were read from."""
        found = super().to_dict()
        for part in ("text_config", "vision_config"):
            if isinstance(found.get(part), dict):
                found[part].pop("_name_or_path", None)
        return found

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """That of the language model; transformers would take the field `generator` for another one."""
        return self.text_config

    def _group(self, schema: type, group: str, **more: Any) -> Any:
        values = getattr(self, group)
        known = {field.name for field in fields(schema)}
        if unknown := sorted(set(values) - known):
            raise ModelError(
                f"config.json: {group}.{unknown[0]} is not known here; the folder was written by a newer version"
            )
        return schema(**values | more)
