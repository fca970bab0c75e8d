"""Configuration of `python -m data_prep`: composed by Hydra from `conf/data_prep`, checked against dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import options, places, settings
from common.errors import ConfigError
from common.settings import setting
from data_prep.division import Divided, check_fractions
from data_prep.prepare import Options, Source, Task
from data_prep.sources.capsfusion import CapsFusion
from data_prep.sources.easy_vqa import EasyVQA
from data_prep.sources.folder import Folder
from data_prep.sources.hf import HuggingFace
from data_prep.sources.llava import Llava
from data_prep.sources.scenes import Scenes
from data_prep.sources.synthetic import Synthetic
from data_prep.sources.webdataset import WebDataset

CONF = places.CONF / "data_prep"
SOURCES: dict[str, type] = {
    "capsfusion": CapsFusion,
    "easy_vqa": EasyVQA,
    "folder": Folder,
    "hf": HuggingFace,
    "llava": Llava,
    "scenes": Scenes,
    "synthetic": Synthetic,
    "webdataset": WebDataset,
}


@dataclass
class PrepareConfig:
    """Keys of `python -m data_prep`.

    Attributes:
        cache_dir: Where parts are.
        root: Prepared data goes to `<root>/<name>/<split>`.
        name: Name of the prepared data set; default that of `source=NAME`.
        val_fraction, test_fraction: Shares of the split `train` that become `val` and `test`, by image; null: as the
            source has it.
        overwrite: Replace data of this name that were made from something else.
        workers: Processes on this machine.
        task: `i/n`, the part of a job array that this process is.
        options: Checks and policy.
        source: The fields of the reader's dataclass.
    """

    cache_dir: str = setting(".cache", path=True)
    root: str = setting("???", path=True)
    name: str = "???"
    val_fraction: float | None = setting(None, within="[0, 1)")
    test_fraction: float | None = setting(None, within="[0, 1)")
    overwrite: bool = False
    workers: int = setting(1, within="[1, 1024]")
    task: str = "0/1"
    options: Options = field(default_factory=Options)
    source: Any = None

    def check(self, prefix: str) -> None:
        """A name that is one folder, and a task.

        Raises:
            ConfigError: a name with a slash.
            DataError: no task.
        """
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ConfigError(f"{prefix}name={self.name}: give the name of one folder")
        check_fractions(self.val_fraction or 0.0, self.test_fraction or 0.0)
        self.build_task()

    def build_source(self) -> Source:
        """The configured source, divided as the configuration says."""
        shares = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        own = {f.name for f in fields(self.source)}  # some sources divide themselves
        source = replace(self.source, **{name: s for name, s in shares.items() if name in own and s is not None})
        rest = {name.removesuffix("_fraction"): s for name, s in shares.items() if name not in own and s}
        return cast(Source, Divided(source, **rest) if rest else source)

    def build_task(self) -> Task:
        """The configured task."""
        return Task.parse(self.task)


def load(overrides: list[str]) -> PrepareConfig:
    """Compose and check the configuration.

    Args:
        overrides: Hydra overrides, `source=NAME` among them.

    Raises:
        ConfigError: no or an unknown source, an unknown key (with the nearest one), a wrong type or value, or a missing
            one.
    """
    chosen = _chosen(overrides)
    schema = schema_of(chosen)
    known = [name for name, *_ in settings.keys(schema)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            composed = compose("config", [_added(word, known) for word in options.as_typed(overrides, schema)])
            tree = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
        except (HydraException, OmegaConfBaseException) as error:
            raise options.explain(error, known) from error
    del tree["source"]["kind"]
    return cast(PrepareConfig, options.typed(schema, {"name": chosen, **tree}))


def _added(word: str, known: list[str]) -> str:
    """A word that sets a known key, so that Hydra takes it although no file of `conf/data_prep` names the key."""
    return f"++{word}" if word.partition("=")[0] in known and not word.startswith("source=") else word


def schema_of(source: str) -> type:
    """`PrepareConfig` with the keys of one source, by the name of its file in `conf/data_prep/source`."""
    kind = SOURCES[cast(DictConfig, OmegaConf.load(CONF / "source" / f"{source}.yaml")).kind]
    return make_dataclass("PrepareConfig", [("source", kind, field(default=cast(Any, "???")))], bases=(PrepareConfig,))


def help_text(overrides: list[str]) -> str:
    """The sources, and the keys of the one that is chosen."""
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("source=")]
    schema = schema_of(chosen[0]) if chosen and chosen[0] in _names() else PrepareConfig
    return f"source=NAME: {', '.join(_names())}\n\n{options.help_text(schema)}"


def _names() -> list[str]:
    return sorted(file.stem for file in (CONF / "source").glob("*.yaml"))


def _chosen(overrides: list[str]) -> str:
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("source=")]
    if len(chosen) != 1 or chosen[0] not in _names():
        said = f"source={chosen[0]}: no such source" if chosen else "which source? Say source=NAME"
        raise ConfigError(f"{said}; there are {', '.join(_names())}")
    return chosen[0]
