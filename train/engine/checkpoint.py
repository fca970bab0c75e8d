"""Checkpoints that a run resumes from exactly: where they are, whether they are sound, and loading one.

    RUN_DIR/checkpoints/step-000500/           DeepSpeed's shards, one file set per rank, and COMPLETE
    RUN_DIR/checkpoints/latest                 name of the newest complete one, for people
    RUN_DIR/checkpoints/universal-step-000500/ made of it for another number of ranks; goes with the next checkpoint
    RUN_DIR/checkpoints/damaged-step-000500/   one that was not what had been written; goes with the next checkpoint

`train.engine.saving` writes them: `COMPLETE` holds size and checksum of every file. All of it is verified before it is
loaded; one that is damaged is named, and the one before it is used.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError
from common.files import DamagedFile, damage, inside, read_json
from train.engine.weights_only import UnsafeCheckpoint, unsafe, weights_only
from train.process import distributed
from train.process.run_files import RunDir

if TYPE_CHECKING:  # DeepSpeed takes seconds to import and evaluation has no need of it
    from train.engine.engine import Engine


COMPLETE = "COMPLETE"
_REMEDY = "the checkpoint cannot be used"


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
        dropped: Dialogues left out as too long, all ranks.
        best_step, best_loss: Step of the lowest validation loss so far, and that; 0 and None before the first.
    """

    step: int = 0
    loader: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    skipped: int = 0
    dropped: int = 0
    best_step: int = 0
    best_loss: float | None = None


def name(step: int) -> str:
    """Of the checkpoint of a step."""
    return f"step-{step:06d}"


def by_step(root: Path) -> list[Path]:
    """The folders named as checkpoints, oldest first; whole or not."""
    return sorted(root.glob("step-*"), key=lambda path: (len(path.name), path.name))


def find(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is what was written; None where there was never one. Collective.

    Newer ones that are damaged are named once and moved aside.

    Raises:
        CheckpointError: there are checkpoints, and none of them is sound.
    """
    root = RunDir(run_dir).checkpoints
    found = [root / name for name in distributed.gather([path.name for path in by_step(root)])[0]]
    wrong: list[tuple[Path, str]] = []
    for path in reversed(found):
        if (problem := damaged(path)) is None:
            break
        wrong.append((path, problem))
    else:
        if wrong:
            raise CheckpointError(
                f"no checkpoint in {root} can be used: {'; '.join(f'{path.name}: {p}' for path, p in wrong)}. Restore "
                "one, or remove that folder to start the run from its beginning"
            )
        return None
    if distributed.rank() == 0:
        for bad, problem in wrong:
            aside = bad.with_name(f"damaged-{bad.name}")
            print(
                f"warning: checkpoint {bad}: {problem}; it is moved to {aside.name}, and {path.name} is used",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(bad, aside)
    distributed.barrier()
    return path


def identity(run_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint that says what it belongs to, and that; its files are not looked at."""
    for path in reversed(by_step(RunDir(run_dir).checkpoints)):
        with suppress(DamagedFile, KeyError):
            return path, read_json(path / COMPLETE, _REMEDY)["identity"]
    return None, {}


def load(engine: Engine, path: Path, identity: dict[str, str]) -> Progress:
    """Restore the engine from a checkpoint that `find` gave. Collective.

    Raises:
        CheckpointError: it belongs to other data or models, or to another number of ranks.
        UnsafeCheckpoint: one of its files holds more than tensors and plain containers.
    """
    record = read_json(path / COMPLETE, _REMEDY)
    # What one rank refuses all refuse, or the others would wait for it in the first thing they do together.
    if refusal := next(filter(None, distributed.gather(_other_identity(path, record, identity))), None):
        raise CheckpointError(refusal)
    if refusal := next(filter(None, distributed.gather(_unsafe(path, record))), None):
        raise UnsafeCheckpoint(refusal)
    if record["world_size"] != distributed.world_size():
        if engine.zero_stage == 0:
            raise CheckpointError(
                f"{path} was written by {record['world_size']} ranks, this run has {distributed.world_size()}; "
                "engine.zero_stage=0 cannot change that"
            )
        path = _reshard(path)
        engine.deepspeed._config.load_universal_checkpoint = True
    # ZeRO-3 checkpoints hold no frozen weights, so strict loading would refuse them all.
    with weights_only():
        loaded, client_state = engine.deepspeed.load_checkpoint(
            str(path.parent), tag=path.name, load_module_strict=engine.zero_stage != 3
        )
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed could not read it")
    torch.set_rng_state(client_state["rng"]["torch"])
    random.setstate(client_state["rng"]["python"])
    return Progress(**record["progress"])


def _other_identity(path: Path, record: dict[str, Any], identity: dict[str, str]) -> str | None:
    for key, value in identity.items():
        if record["identity"].get(key) != value:
            return (
                f"{path} belongs to another {key} (fingerprint {record['identity'].get(key)}, here {value}); "
                f"restore that {key}, or start a new run directory"
            )
    return None


def _unsafe(path: Path, record: dict[str, Any]) -> str | None:
    """The same of this rank's share of the files."""
    share = sorted(record["files"])[distributed.rank() :: distributed.world_size()]
    return next(filter(None, (unsafe(inside(path, name)) for name in share)), None)


def _reshard(path: Path) -> Path:
    """Convert a checkpoint to DeepSpeed's universal form, which any number of ranks can read. Collective."""
    universal = path.with_name(f"universal-{path.name}")
    reason = ""
    if distributed.rank() == 0:
        temporary = path.with_name(f".{universal.name}.writing")
        for folder in (temporary, universal):
            shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "train.engine.weights_only", str(path.absolute()), str(temporary.absolute())]
        code = Path(__file__).resolve().parents[2]
        # Its error comes back on stderr, not through this rank's file for the launcher.
        environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_ERROR_FILE"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=code, env=environment)
        if done.returncode == 0:
            os.replace(temporary, universal)
        else:
            # DeepSpeed's bars end no line.
            said = re.findall(r"error: (.+)", done.stderr) or done.stderr.strip().splitlines()
            reason = said[-1] if said else f"exit code {done.returncode}"
            shutil.rmtree(temporary, ignore_errors=True)
    if reason := distributed.gather(reason)[0]:
        raise CheckpointError(f"{path} could not be converted to {distributed.world_size()} ranks: {reason}")
    return universal


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, each rank looking at its share of the files; None: nothing. Collective."""
    try:
        files = read_json(path / COMPLETE, _REMEDY)["files"]
        share = sorted(files)[distributed.rank() :: distributed.world_size()]
        problem = damage(path, {name: files[name] for name in share})
    except DamagedFile as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError):
        problem = f"{COMPLETE} was written by another version of this program"
    return next((found for found in distributed.gather(problem) if found), None)
