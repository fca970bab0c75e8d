"""The run directory: one directory = one run = one wandb run.

config.yaml      the resolved configuration, all that workers read
run.json         id, command, git commit, versions, creation time
git.diff         uncommitted changes of the code, if any
metrics.jsonl    one record per line
checkpoints/ export/ wandb/ samples/
STOP             ask a running job to stop (any content)
DONE             the stage has finished and its export is written
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import UserError
from train import config as configuration
from train.config import RunConfig

_CODE = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "hydra-core", "wandb", "safetensors", "triton")
# Where and how a run is executed may change between its lifetimes; what it computes may not.
_MAY_CHANGE = {
    "launch", "tracking", "checkpoint", "evaluation", "run_dir", "output_root", "cache_dir", "check",
    "data.root", "data.num_workers", "data.prefetch", "data.on_corrupt_shard",
}  # fmt: skip


def create(config: RunConfig) -> Path:
    """Make the run directory, or re-enter an existing one of the same configuration.

    Raises:
        UserError: the directory holds a run of another configuration, or something else.
    """
    if config.run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.stage.name}-{config.connector.name}-{secrets.token_hex(2)}"
        config.run_dir = str(Path(config.output_root) / name)
    path = Path(config.run_dir)
    if (path / "config.yaml").exists():
        _require_same(configuration.read(path / "config.yaml"), config, path)
        configuration.save(config, path / "config.yaml")
        return path
    if path.exists() and any(path.iterdir()):
        raise UserError(f"run_dir={path} exists and is no run directory; choose another")
    path.mkdir(parents=True, exist_ok=True)
    commit, diff = git_state()
    record = {
        "id": secrets.token_hex(4),
        "name": path.name,
        "command": sys.argv,
        "git_commit": commit,
        "git_dirty": bool(diff),
        "created": time.time(),
        "versions": versions(),
    }
    if diff:
        (path / "git.diff").write_text(diff)
    (path / "run.json").write_text(json.dumps(record, indent=1))
    configuration.save(config, path / "config.yaml")
    return path


def _require_same(old: RunConfig, new: RunConfig, path: Path) -> None:
    before, after = asdict(old), asdict(new)
    for key in _flat(after) | _flat(before):
        fixed = _MAY_CHANGE.isdisjoint((key, key.split(".")[0]))
        if fixed and _at(before, key) != _at(after, key):
            raise UserError(
                f"run_dir={path} holds a run with {key}={_at(before, key)}, now it is {_at(after, key)}; "
                "give the same value to continue it, or another run_dir for a new run"
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


def read_record(path: Path) -> dict:
    """`run.json`.

    Raises:
        UserError: not a run directory.
    """
    try:
        return json.loads((path / "run.json").read_text())
    except OSError as error:
        raise UserError(f"{path} is not a run directory ({error})") from error


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


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
