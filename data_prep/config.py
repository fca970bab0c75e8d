"""Configuration of `python -m data_prep`: composed by Hydra from `conf/data_prep`, checked against dataclasses."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import places
from data_prep.division import Divided, check_fractions
from data_prep.prepare import Options, Source, Task
from data_prep.sources.capsfusion import CapsFusion
from data_prep.sources.easy_vqa import EasyVQA
from data_prep.sources.hf import HuggingFace
from data_prep.sources.llava import Llava
from data_prep.sources.synthetic import Synthetic
from data_prep.sources.webdataset import WebDataset
from data_prep.store.errors import DataError

CONF = places.CONF / "data_prep"
SOURCES: dict[str, type] = {
    "capsfusion": CapsFusion,
    "easy_vqa": EasyVQA,
    "hf": HuggingFace,
    "llava": Llava,
    "synthetic": Synthetic,
    "webdataset": WebDataset,
}


@dataclass
class PrepareConfig:
    """Keys of `python -m data_prep`.

    Attributes:
        cache_dir: Where parts are.
        source: `kind` (a key of `SOURCES`) and the fields of that reader's dataclass.
        root: Prepared data goes to `<root>/<name>/<split>`.
        name: Name of the prepared data set; default that of `source=NAME`.
        val_fraction, test_fraction: Shares of the split `train` that become `val` and `test`, by image; null: as the
            source has it.
        overwrite: Replace data of this name that were made from something else.
        workers: Processes on this machine.
        task: `i/n`, the part of a job array that this process is.
        options: Checks and policy.
    """

    cache_dir: str
    source: dict[str, Any]
    root: str
    name: str
    val_fraction: float | None = None
    test_fraction: float | None = None
    overwrite: bool = False
    workers: int = 1
    task: str = "0/1"
    options: Options = field(default_factory=Options)

    def build_source(self) -> Source:
        """The configured source.

        Raises:
            DataError: unknown source or key of it.
        """
        values = dict(self.source)
        kind = SOURCES[values.pop("kind")]
        for key in ("samples", "samples_per_shard"):
            if isinstance(values.get(key), int) and values[key] < 1:
                raise DataError(f"source.{key}={values[key]}: at least 1")
        shares = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        check_fractions(*(share or 0.0 for share in shares.values()))
        own = {f.name for f in fields(kind)}  # some sources divide themselves
        values |= {name: share for name, share in shares.items() if name in own and share is not None}
        rest = {name.removesuffix("_fraction"): share for name, share in shares.items() if name not in own and share}
        try:
            source = cast(Source, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
            return Divided(source, **rest) if rest else source
        except OmegaConfBaseException as error:
            raise _explain(error, [f"source.{f.name}" for f in fields(kind)], "source.") from error

    def build_task(self) -> Task:
        """The configured task."""
        return Task.parse(self.task)


def load(overrides: list[str]) -> PrepareConfig:
    """Compose and check the configuration.

    Args:
        overrides: Hydra overrides, `source=NAME` among them.

    Raises:
        DataError: no or an unknown source, an unknown key (with the nearest one), a wrong type or a missing value.
    """
    names = sorted(file.stem for file in (CONF / "source").glob("*.yaml"))
    chosen = [override.partition("=")[2] for override in overrides if override.startswith("source=")]
    if len(chosen) != 1 or chosen[0] not in names:
        said = f"source={chosen[0]}: no such source" if chosen else "which source? Say source=NAME"
        raise DataError(f"{said}; there are {', '.join(names)}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("config", [f"source={chosen[0]}"])
        try:
            composed = compose("config", overrides)
            composed.name = composed.name or chosen[0]
            merged = OmegaConf.merge(OmegaConf.structured(PrepareConfig), composed)
            OmegaConf.resolve(merged)
            return cast(PrepareConfig, OmegaConf.to_object(merged))
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, _keys(cast(dict[str, Any], OmegaConf.to_container(plain, resolve=False)))) from error


def _explain(error: Exception, known: list[str], prefix: str = "") -> DataError:
    text = str(error.__cause__ or error)
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if key is None and (match := re.search(r"[Kk]ey '([\w.]+)'", str(error))):
        key = match[1]
    if key:
        key = prefix + key
    if key and key not in known:
        return DataError(f"unknown configuration key {key}{_nearest(key, known)}")
    first = " ".join(text.split("\n")[0].split())
    return DataError(f"configuration key {key}: {first}" if key else f"configuration: {first}")


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys
