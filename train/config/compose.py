"""Turns what Hydra composed into a checked `RunConfig`; writes and reads the resolved file.

Workers read the resolved file and know no Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import options, settings
from common.errors import ConfigError
from common.files import DamagedFile, made_before_checksums, read_text, text_checksum, write_atomically
from model.config import MovedTo
from train.config import presets
from train.config.check import validate
from train.config.models import located
from train.config.schema import RunConfig
from train.process.run_files import RunDir

_CHECKSUM = "# checksum: "
# The schema is the first entry of conf/config.yaml's defaults, so every key can be set on the command line, typed.
ConfigStore.instance().store("schema", node=RunConfig)
presets.register()


def resolve(composed: DictConfig | ListConfig) -> RunConfig:
    """Check a composed configuration against the schema and its cross-field rules.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, or a rule broken; names the key.
    """
    # As plain containers: Hydra lets `+key=value` add keys to a typed node, merging into a fresh one does not.
    config: RunConfig = options.typed(RunConfig, cast(dict, OmegaConf.to_container(composed)))
    config.data.use_named(config.stage.name)
    validate(config)
    return config


def check_words(composed: DictConfig, words: Sequence[str]) -> None:
    """Check that nothing given on the command line would be replaced in silence.

    Args:
        composed: What Hydra made of the words.
        words: Overrides, `key=value`.

    Raises:
        ConfigError: a split is given beside `data.name`, which decides all of them; `generator.every` or `above` is
            given beside `generator.layers`, which decide.
    """
    name = OmegaConf.select(composed, "data.name")
    keys = [word.partition("=")[0].lstrip("+") for word in words]
    if name and (given := [key for key in keys if key in ("data.train", "data.val", "data.test")]):
        raise ConfigError(
            f"{given[0]} is given, and data.name={name}, which decides train, val and test; "
            "give data.name=null with the splits, or data.name alone"
        )
    layers = OmegaConf.select(composed, "generator.layers")
    for key in ("generator.every", "generator.above"):
        if layers is not None and key in keys and (value := OmegaConf.select(composed, key)):
            raise ConfigError(
                f"{key}={value} is given, and generator.layers={list(layers)}, which decide where deltas go; "
                "add generator.layers=null"
            )


def explain(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's complaint as one line that names the key and the nearest known one."""
    return options.explain(error, schema_keys())


def schema_keys(schema: type = RunConfig) -> list[str]:
    """Every dotted key of the schema."""
    return [name for name, _, _, _ in settings.keys(schema) if "[]" not in name]


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically; its last line is its checksum."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    write_atomically(path, f"{text}{_CHECKSUM}{text_checksum(text)}\n")


def read(path: Path, llm: MovedTo | None = None, vision: MovedTo | None = None) -> RunConfig:
    """Read what `save` wrote, as it was given on the command line.

    Args:
        path: The file.
        llm, vision: Where the base models are, if they have moved.

    Raises:
        ConfigError: no such file, or not a run configuration of this version.
        DamagedFile: it is not what was written.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file; is this a run directory?")
    remedy = "restore it, or remove it: started again with its own overrides the run writes it anew"
    content = read_text(path, remedy)
    text, mark, written = content.rpartition(_CHECKSUM)
    if not mark:
        if not made_before_checksums(RunDir(path.parent).record):
            raise DamagedFile(f"{path} is damaged: its last line, the checksum, is missing; {remedy}")
        text = content
    elif written.strip() != text_checksum(text):
        raise DamagedFile(f"{path} is damaged: it is not what was written (checksum); {remedy}")
    if "${" in text:  # what `save` writes is resolved; this would read the environment of whoever runs it
        raise DamagedFile(f"{path} refers to something outside it (${{...}}), which this program writes not; {remedy}")
    try:
        config = resolve(_renamed(options.load_yaml(text)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    config.llm.path = (llm and llm.path) or config.llm.path
    config.vision.path = (vision and vision.path) or config.vision.path
    return config


def _renamed(tree: Any) -> Any:
    """A run's configuration with today's names for the keys of release 0.1.0, all others of which are still there."""
    if not isinstance(tree, DictConfig):
        return tree
    tracking, evaluation = tree.get("tracking"), tree.get("evaluation")
    if isinstance(tracking, DictConfig) and isinstance(evaluation, DictConfig) and "samples_every" in tracking:
        every = tracking.pop("samples_every")
        if OmegaConf.select(tree, "data.val"):  # without it, it was taken and did nothing
            evaluation.setdefault("every", every)
    return tree


def load(path: Path, llm: MovedTo | None = None, vision: MovedTo | None = None) -> RunConfig:
    """Read what `save` wrote, with the folders that its models have on this machine.

    Args:
        path: The file.
        llm, vision: Where the base models are, if they have moved.

    Raises:
        ConfigError, DamagedFile: as `read`.
    """
    return located(read(path, llm, vision))


def compose_overrides(overrides: list[str]) -> DictConfig:
    """What `python -m train OVERRIDES` would compose, not yet checked (`resolve` does): for commands of another kind.

    Raises:
        ConfigError: an unknown key or choice, or a word that another would replace.
    """
    try:
        with initialize_config_dir(str(presets.CONF), version_base="1.3"):
            composed = compose("config", options.as_typed(overrides, RunConfig))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    check_words(composed, overrides)
    return composed
