"""Turns what Hydra composed into a checked `RunConfig`; writes and reads the resolved file.

Workers read the resolved file and know no Hydra.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import settings
from train.config import presets
from train.config.check import ConfigError, validate
from train.config.schema import RunConfig

# The schema is the first entry of conf/config.yaml's defaults, so every key can be set on the command line, typed.
ConfigStore.instance().store("schema", node=RunConfig)
presets.register()


def resolve(composed: DictConfig | ListConfig) -> RunConfig:
    """Check a composed configuration against the schema and its cross-field rules.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, or a rule broken; names the key.
    """
    try:
        # As plain containers: Hydra lets `+key=value` add keys to a typed node, merging into a fresh one does not.
        plain = OmegaConf.create(OmegaConf.to_container(composed))
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        OmegaConf.resolve(merged)
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise explain(error) from error
    settings.check(config)
    validate(config)
    return config


def parse_options(schema: type, arguments: list[str]) -> Any:
    """An instance of the dataclass `schema` from `key=value` arguments, for the commands that are no Hydra programs.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, or no value for a key that needs one.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(arguments)))
    except OmegaConfBaseException as error:
        raise explain(error, schema_keys(schema)) from error


def explain(error: Exception, known: list[str] | None = None) -> ConfigError:
    """Hydra's or OmegaConf's complaint as one line that names the key and the nearest known one."""
    text = str(error.__cause__ or error)
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if match := re.search(r"(?:full_key: |[Kk]ey ')([\w.\[\]]+)", text):
        key = key or match.group(1)
    first = text.strip().splitlines()[0]
    known = schema_keys() if known is None else known
    if key and key not in known and ("not in" in text or "Missing key" in text):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return ConfigError(f"unknown configuration key `{key}`{hint}")
    if "Missing mandatory value" in text or "MissingMandatoryValue" in type(error).__name__:
        return ConfigError(f"configuration key `{key}` has no value; set it on the command line: {key}=...")
    return ConfigError(f"configuration key `{key}`: {first}" if key else first)


def schema_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        nested = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(nested):
            keys += schema_keys(type(nested), f"{prefix}{f.name}.")
    return keys


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def load(path: Path) -> RunConfig:
    """Read what `save` wrote.

    Raises:
        ConfigError: no such file, or not a run configuration of this version.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; is this a run directory?")
    return resolve(OmegaConf.load(path))
