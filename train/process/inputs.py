"""What a run reads and is not on this machine: models, prepared data, the run it starts from."""

from __future__ import annotations

from pathlib import Path

from common.errors import ConfigError
from data_prep.store.manifest import MANIFEST
from data_prep.store.pixels import load_preprocessor
from train.config import RunConfig, located, missing_models
from train.data import is_prepared
from train.process.run_files import RunDir


def missing_data(config: RunConfig) -> list[str]:
    """One line for each split, and for the run to start from, as `key=value: what is missing and what to do`."""
    data, lines = config.data, []
    splits = {f"data.train[{number}].path": source.path for number, source in enumerate(data.train)}
    splits |= {f"data.{name}": path for name, path in (("val", data.val), ("test", data.test)) if path}
    for key, path in splits.items():
        if not is_prepared(data, path):
            cure = "" if "train" in key else f", or set {key}=null"
            folder = Path(data.root) / path
            # Left by a preparation that did not end, or a copy that lost a file.
            what = f"{folder} has no {MANIFEST}" if folder.is_dir() else f"no prepared split in {data.root}"
            lines.append(f"{key}={path}: {what}; make it with python -m data_prep{cure}")
    run = config.init_from
    if run is not None and not RunDir(Path(run)).export.is_dir():
        lines.append(f"init_from={run}: {run} has no finished export; name the run to start from")
    return lines


def require(config: RunConfig) -> list[str]:
    """Refuse a run on this machine that lacks an input, before anything is started.

    With `check=true` a model may be elsewhere where its `architecture` is given, and so may data and the run to start
    from where `data.expected_length` says what to plan with. A run that is only prepared (`launch.mode=none`) reads its
    data later: they may be made by a job before it.

    Returns:
        What is not here, where that is allowed.

    Raises:
        ConfigError: names the key, what is missing and what to do.
    """
    models, data = missing_models(config), missing_data(config)
    if models and not config.check:
        raise ConfigError(models[0])
    planned = config.check and config.data.expected_length is not None
    if data and config.launch.mode == "local" and not planned:
        raise ConfigError(data[0])
    if not models:
        load_preprocessor(located(config).vision)  # finds what is wrong with it
    return [*models, *data]
