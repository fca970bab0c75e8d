"""Turns what Hydra composed into a checked `RunConfig`; writes and reads the resolved file.

Workers read the resolved file and know no Hydra.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import options, settings
from common.errors import ConfigError
from common.files import write_atomically
from train.config import presets
from train.config.check import validate
from train.config.models import located
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


def explain(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's complaint as one line that names the key and the nearest known one."""
    return options.explain(error, schema_keys())


def schema_keys(schema: type = RunConfig) -> list[str]:
    """Every dotted key of the schema."""
    return [name for name, _, _, _ in settings.keys(schema) if "[]" not in name]


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def read(path: Path) -> RunConfig:
    """Read what `save` wrote, as it was given on the command line.

    Raises:
        ConfigError: no such file, a damaged one, or not a run configuration of this version.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}; is this a run directory?")
    try:
        tree = options.load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(tree, DictConfig) or not tree:
            raise ConfigError("empty" if not tree else "not a mapping of keys")
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or give the run's command again (it stands in "
            f"{path.with_name('run.json')}) with another run_dir"
        ) from error
    try:
        return resolve(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load(path: Path) -> RunConfig:
    """Read what `save` wrote, with the folders that its models have on this machine.

    Raises:
        ConfigError: as `read`.
    """
    return located(read(path))


def compose_overrides(overrides: list[str]) -> DictConfig:
    """What `python -m train OVERRIDES` would compose, not yet checked (`resolve` does): for commands of another kind.

    Raises:
        ConfigError: an unknown key or choice.
    """
    conf = str(Path(__file__).resolve().parents[2] / "conf")
    try:
        with initialize_config_dir(conf, version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
