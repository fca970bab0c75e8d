"""Checkpoints that a run resumes from exactly, and that no crash can leave half written.

    RUN_DIR/checkpoints/step-000500/     DeepSpeed's shards, one file set per rank, and COMPLETE
    RUN_DIR/checkpoints/latest           name of the newest complete one

A checkpoint is written under a temporary name, synced, marked `COMPLETE` with the size of every file, renamed, and
only then does `latest` point to it. (DeepSpeed's own `latest` is written before the other ranks are done.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from common.files import sync, write_atomically
from train.process import distributed

if TYPE_CHECKING:  # DeepSpeed takes seconds to import and evaluation has no need of it
    from train.engine.engine import Engine


FOLDER = "checkpoints"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to something else."""


@dataclass
class Progress:
    """Where a run stands; the same on all ranks.

    Attributes:
        step: Optimizer steps done.
        loader: State of the training loader.
        samples, tokens, targets: Seen so far, all ranks.
        seconds: Training time of all lifetimes.
        skipped: Steps skipped for a non-finite gradient.
    """

    step: int = 0
    loader: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    skipped: int = 0


def save(engine: Engine, run_dir: Path, progress: Progress, identity: dict[str, str], keep: int) -> Path:
    """Write a checkpoint. Collective.

    Args:
        identity: What the checkpoint belongs to (data, LLM, vision encoder, ...); compared on resume.
        keep: Complete checkpoints to keep, this one included.

    Raises:
        CheckpointError: it cannot be written; the earlier ones stay.
    """
    root = run_dir / FOLDER
    name = f"step-{progress.step:06d}"
    if (root / name / "COMPLETE").exists():
        return root / name
    temporary = f".{name}.writing"
    if distributed.rank() == 0:
        shutil.rmtree(root / temporary, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    _check_room(engine, root)
    distributed.barrier()
    client_state = {"rng": {"torch": torch.get_rng_state(), "python": random.getstate()}}
    try:
        # Frozen weights come from the base models, whose identity is checked instead.
        engine.deepspeed.save_checkpoint(
            str(root),
            tag=temporary,
            client_state=client_state,
            exclude_frozen_parameters=engine.zero_stage == 3,
            save_latest=False,
        )
        failed = 0.0
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        failed, reason = 1.0, error
    # All ranks must agree that every shard is there before the name changes.
    if distributed.reduce([failed], engine.device, "max")[0]:
        detail = f": {reason}" if failed else " on another rank"
        raise CheckpointError(f"{root / name} could not be written{detail}; the earlier checkpoints are untouched")
    if distributed.rank() == 0:
        _publish(root, temporary, name, progress, identity)
        _prune(root, keep)
    distributed.barrier()
    return root / name


def find(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    root = run_dir / FOLDER
    complete = [p for p in sorted(root.glob("step-*")) if _is_complete(p)]
    return complete[-1] if complete else None


def load(engine: Engine, path: Path, identity: dict[str, str]) -> Progress:
    """Restore the engine from a complete checkpoint. Collective.

    Raises:
        CheckpointError: it belongs to other data or models, or to another number of ranks.
    """
    record = json.loads((path / "COMPLETE").read_text())
    for key, value in identity.items():
        if record["identity"].get(key) != value:
            raise CheckpointError(
                f"{path} belongs to another {key} (fingerprint {record['identity'].get(key)}, here {value}); "
                f"restore that {key}, or start a new run directory"
            )
    if record["world_size"] != distributed.world_size():
        if engine.zero_stage == 0:
            raise CheckpointError(
                f"{path} was written by {record['world_size']} ranks, this run has {distributed.world_size()}; "
                "engine.zero_stage=0 cannot change that"
            )
        path = _reshard(path)
        engine.deepspeed._config.load_universal_checkpoint = True
    # ZeRO-3 checkpoints hold no frozen weights, so strict loading would refuse them all.
    loaded, client_state = engine.deepspeed.load_checkpoint(
        str(path.parent), tag=path.name, load_module_strict=engine.zero_stage != 3
    )
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed could not read it")
    torch.set_rng_state(client_state["rng"]["torch"])
    random.setstate(client_state["rng"]["python"])
    return Progress(**record["progress"])


def _reshard(path: Path) -> Path:
    """Convert a checkpoint to DeepSpeed's universal form, which any number of ranks can read. Collective."""
    universal = path.with_name(f"universal-{path.name}")
    if distributed.rank() == 0 and not universal.exists():
        temporary = path.with_name(f".{universal.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        options = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        done = subprocess.run(
            [*command, "--input_folder", str(path), "--output_folder", str(temporary), *options],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            os.replace(temporary, universal)
        else:
            print(done.stderr[-2000:], file=sys.stderr)
    distributed.barrier()
    if not universal.exists():
        raise CheckpointError(f"{path} could not be converted to {distributed.world_size()} ranks; see above")
    return universal


def _publish(root: Path, temporary: str, name: str, progress: Progress, identity: dict[str, str]) -> None:
    folder = root / temporary
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(file)
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    record = {
        "progress": asdict(progress),
        "world_size": distributed.world_size(),
        "identity": identity,
        "files": sizes,
    }
    write_atomically(folder / "COMPLETE", json.dumps(record, indent=1))
    shutil.rmtree(root / name, ignore_errors=True)  # half deleted or damaged; a complete one was never written again
    os.replace(folder, root / name)
    sync(root)
    write_atomically(root / "latest", name + "\n")


def _is_complete(path: Path) -> bool:
    try:
        files: dict[str, Any] = json.loads((path / "COMPLETE").read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _prune(root: Path, keep: int) -> None:
    complete = [p for p in sorted(root.glob("step-*")) if _is_complete(p)]
    for path in complete[:-keep]:
        # COMPLETE goes first: a checkpoint half deleted must not look whole.
        (path / "COMPLETE").unlink()
        shutil.rmtree(path)


def _check_room(engine: Engine, root: Path) -> None:
    """Refuse to start writing what does not fit: fp32 weights and two moments of every trained parameter."""
    if distributed.rank() == 0:
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters() if p.requires_grad)
        need, free = 12 * trained + 2**20, shutil.disk_usage(root).free
        short = float(free < need)
    else:
        short = 0.0
    if distributed.reduce([short], engine.device, "max")[0]:
        detail = f": {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free" if distributed.rank() == 0 else ""
        raise CheckpointError(
            f"no room on disk for a checkpoint in {root}{detail}; free some or lower checkpoint.keep. "
            "The earlier checkpoints are untouched"
        )
