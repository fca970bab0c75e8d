"""Makes a run directory, or re-enters one; `train.process.run_files.RunDir` says what is in it."""

from __future__ import annotations

import math
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from common.errors import UserError
from common.files import DamagedFile, read_json, remove_temporaries, write_atomically, write_json
from model.loading import fingerprint
from train import config as configuration
from train.config import RunConfig
from train.process.run_files import RunDir

_CODE = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "hydra-core", "wandb", "safetensors", "triton")
# Where and how a run is executed may change between its lifetimes; what it computes may not.
_MAY_CHANGE = {
    "launch", "tracking", "checkpoint", "evaluation", "debug", "run_dir", "output_root", "cache_dir", "check",
    "data.root", "data.expected_length", "data.num_workers", "data.prefetch", "data.on_corrupt_shard",
    "llm.path", "vision.path",  # compared by fingerprint
    "engine.micro_batch_size", "engine.gradient_checkpointing", "engine.memory_gib", "engine.timeout_minutes",
    "engine.hang_minutes",
}  # fmt: skip
_NAMES = RunDir(Path())
# What a directory may hold whose making was cut short.
_BEGUN = {_NAMES.record.name, _NAMES.diff.name}


def create(config: RunConfig) -> Path:
    """Make the run directory, or re-enter an existing one of the same configuration.

    One in which nothing has been trained yet (a start that failed) is made anew for any configuration.

    Raises:
        UserError: the directory holds a run of another configuration, or something else.
    """
    if config.run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.stage.name}-{config.connector.name}-{secrets.token_hex(2)}"
        config.run_dir = str(Path(config.output_root) / name)
    _make_absolute(config)
    path = Path(config.run_dir)
    for folder in (path, RunDir(path).checkpoints, RunDir(path).samples, RunDir(path).hang):
        remove_temporaries(folder)
    failed_start = RunDir(path).config.exists() and not has_trained(path) and not _is_same(path, config)
    if RunDir(path).config.exists() and not failed_start:
        if not RunDir(path).record.exists():
            print(f"warning: {RunDir(path).record} was missing; the run gets a new id", file=sys.stderr)
            _write_record(path, config)
        record = read_record(path)
        old = configuration.read(RunDir(path).config)
        _require_same(old, config, path)
        _require_same_models(old, config, record.get("models", {}))
        configuration.save(config, RunDir(path).config)
        if (old.stage.steps, old.stage.epochs) != (config.stage.steps, config.stage.epochs):
            RunDir(path).done.unlink(missing_ok=True)  # it is longer now
        if old.checkpoint.export != config.checkpoint.export:
            RunDir(path).done.unlink(missing_ok=True)  # other weights are exported
        return path
    names = {p.name for p in path.iterdir() if not p.name.startswith(".")} if path.exists() else set()
    if failed_start:
        print(f"{path}: a start with another configuration trained nothing; made anew", file=sys.stderr)
    elif _NAMES.record.name in names and names - _BEGUN:
        print(f"warning: {RunDir(path).config} was missing; it is written anew from this command line", file=sys.stderr)
    elif names - _BEGUN:
        raise UserError(f"run_dir={path} exists and is no run directory; choose another")
    path.mkdir(parents=True, exist_ok=True)
    if failed_start or not RunDir(path).record.exists():
        _write_record(path, config)
    configuration.save(config, RunDir(path).config)
    return path


def _write_record(path: Path, config: RunConfig) -> None:
    commit, diff = git_state()
    record = {
        "id": secrets.token_hex(4),
        "name": path.name,
        "command": sys.argv,
        "git_commit": commit,
        "git_dirty": bool(diff),
        "created": time.time(),
        "versions": versions(),
        "models": _models(config),
    }
    if diff:
        write_atomically(RunDir(path).diff, diff)
    write_json(RunDir(path).record, record)


def _make_absolute(config: RunConfig) -> None:
    """A run works from every folder: its paths are absolute. Names on the hub stay as they are."""
    for part in (config.llm, config.vision):
        if part.path.startswith((".", "/", "~")) or Path(part.path).is_dir():
            part.path = _absolute(part.path)
    config.data.root, config.cache_dir = _absolute(config.data.root), _absolute(config.cache_dir)
    config.output_root = _absolute(config.output_root)
    if config.init_from is not None:
        config.init_from = _absolute(config.init_from)
    if config.run_dir is not None:
        config.run_dir = _absolute(config.run_dir)


def _absolute(path: str) -> str:
    # As the user names it: links are not followed, a file system may be mounted elsewhere tomorrow.
    return os.path.abspath(Path(path).expanduser())


def _models(config: RunConfig) -> dict[str, str]:
    """Fingerprints of the base models that are here; on a cluster they may be on the nodes only."""
    found = {}
    here = configuration.located(config)
    for name, part in (("llm", here.llm), ("vision", here.vision)):
        with suppress(ValueError, OSError):
            found[name] = fingerprint(str(part.path))
    return found


def _require_same_models(old: RunConfig, new: RunConfig, known: dict[str, str]) -> None:
    """A model may have moved; it must still be the same one. (Every checkpoint says so too, when it is loaded.)"""
    new = configuration.located(new)
    for name, before, after in (("llm", old.llm.path, new.llm.path), ("vision", old.vision.path, new.vision.path)):
        if before != after and name in known and (seen := fingerprint(after)) != known[name]:
            raise UserError(
                f"{name}.path={after} is another model (fingerprint {seen}) than the run began with ({known[name]}, "
                f"from {before}); name the folder that one has moved to, or another run_dir for a new run"
            )


def has_trained(path: Path) -> bool:
    """Whether a run directory holds a step's result: a metric, a checkpoint, an export."""
    metrics = RunDir(path).metrics
    found = [RunDir(path).done, RunDir(path).export, *RunDir(path).checkpoints.glob("*")]
    return any(file.exists() for file in found) or metrics.is_file() and metrics.stat().st_size > 0


def _is_same(path: Path, config: RunConfig) -> bool:
    try:
        _require_same(configuration.read(RunDir(path).config), config, path)
    except UserError:
        return False
    return True


def _require_same(old: RunConfig, new: RunConfig, path: Path) -> None:
    before, after = asdict(old), asdict(new)
    for key in sorted(_flat(after) | _flat(before)):
        fixed = _MAY_CHANGE.isdisjoint((key, key.split(".")[0]))
        if not fixed or _at(before, key) == _at(after, key):
            continue
        if key in ("stage.steps", "stage.epochs"):
            _require_extension(old, new, path, key)
            continue
        raise UserError(
            f"run_dir={path} holds a run with {key}={_at(before, key)}, now it is {_at(after, key)}; "
            "give the same value to continue it, or another run_dir for a new run"
        )


def _require_extension(old: RunConfig, new: RunConfig, path: Path, key: str) -> None:
    """A run may become longer where its steps so far are those of the longer run, learning rates included."""
    before, after = getattr(old.stage, key.split(".")[1]), getattr(new.stage, key.split(".")[1])
    what = f"run_dir={path} holds a run with {key}={before}, now it is {after}"
    if before is None or after is None or after < before:
        raise UserError(f"{what}: a run can only become longer; give the same value, or another run_dir")
    if new.optim.schedule != "constant":
        raise UserError(
            f"{what}: with optim.schedule={new.optim.schedule} the learning rate of every step depends on the length, "
            "so it cannot be extended (optim.schedule=constant without warm-up can); a new run with another run_dir "
            f"and init_from={path} builds on its weights"
        )
    ratio = new.optim.warmup_ratio
    if ratio and (key == "stage.epochs" or math.ceil(ratio * before) != math.ceil(ratio * after)):
        raise UserError(
            f"{what}: optim.warmup_ratio={ratio} makes the warm-up longer too, so the run cannot be extended; start a "
            f"new one with another run_dir (init_from={path} builds on its weights)"
        )


def _flat(tree: dict, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in tree.items():
        keys |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return keys


def _at(tree: dict, key: str) -> object:
    value: object = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_record(path: Path) -> dict[str, Any]:
    """`run.json`.

    Raises:
        DamagedFile: not a run directory, or the file is damaged.
    """
    if not RunDir(path).record.exists() and not RunDir(path).config.exists():
        raise DamagedFile(f"{path} is not a run directory (no {_NAMES.record.name})")
    return read_json(RunDir(path).record, "remove it, and the run gets a new id at its next start")


def git_state() -> tuple[str | None, str]:
    """Commit and uncommitted diff of the code; (None, "") outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_CODE), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return (commit.strip() if commit else None), git("diff", "HEAD") or ""


def machine() -> str:
    """Processor, cores, memory and, where there is one, GPU of this machine."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    processor = found[1].strip() if found else platform.processor() or platform.machine()
    parts = [processor, f"{psutil.cpu_count()} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
