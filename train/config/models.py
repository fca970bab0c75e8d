"""The models that a configuration names, as they lie on this machine."""

from __future__ import annotations

from dataclasses import replace

from model.pretrained import ModelError, locate
from train.config.schema import RunConfig


def located(config: RunConfig) -> RunConfig:
    """The same with the folder of each model that is here (`model.pretrained`); others stay as they were named."""
    llm, vision = _found("llm", config), _found("vision", config)
    return replace(
        config,
        llm=replace(config.llm, path=llm[0] or config.llm.path),
        vision=replace(config.vision, path=vision[0] or config.vision.path),
    )


def missing_models(config: RunConfig) -> list[str]:
    """One line for each model of the configuration that cannot be trained with as it is; says what to do."""
    return [problem for what in ("llm", "vision") if (problem := _found(what, config)[1])]


def _found(what: str, config: RunConfig) -> tuple[str | None, str | None]:
    """Folder, or what is wrong."""
    try:
        return str(locate(what, getattr(config, what).path, config.cache_dir)), None
    except ModelError as error:
        return None, str(error)
