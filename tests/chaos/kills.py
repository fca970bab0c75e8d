"""Runs that are killed again and again must end bit for bit as one that was left alone, with nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from common.files import file_names, file_sha256
from tests.chaos.points import Plan
from tests.train import world
from train.measure.tracking import read_metrics

RANKS, STEPS = 2, 8
TIMEOUT = 1800.0
"""Seconds, on a machine that may be busy."""


@dataclass
class Outcome:
    """What became of one run.

    Attributes:
        name: Kind and number of the run.
        kills: What was planned, and whether the process died of it.
        problems: Everything that is not as it should be; empty: bit for bit as undisturbed.
    """

    name: str
    kills: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    landed: int = 0


def arguments(home: Path, kind: str, run: Path) -> list[str]:
    """Command line of a run: `pretrain`, `finetune`, or `cached` (features of the frozen encoder read from disk)."""
    more = ["stage=finetune", f"init_from={home}/reference-pretrain", "engine.gradient_checkpointing=true"]
    cached = ["vision.cache=true", f"cache_dir={run.parent}/cache"]
    return world.overrides(
        home, run, f"stage.steps={STEPS}", "checkpoint.every=3", "data.val=squares/val", "tracking.num_samples=2",
        "evaluation.every=4", "tracking.log_every=1", f"launch.workers={RANKS}",
        *{"finetune": more, "cached": cached}.get(kind, []),
    )  # fmt: skip


def reference(home: Path, kind: str) -> Path:
    """An undisturbed run, made once."""
    run = home / f"reference-{kind}"
    if not (run / "DONE").exists():
        done = world.train(arguments(home, kind, run), timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"the undisturbed run failed: {done.stderr}")
    return run


def kill_run(home: Path, folder: Path, kind: str, plans: list[Plan | float]) -> Outcome:
    """Start a run and have it killed as each plan says (a number: after so many seconds); then let it finish.

    Args:
        home: World with models, data and the undisturbed runs.
        folder: New, of this run alone.
    """
    run, temporary = folder / "run", folder / "tmp"
    temporary.mkdir(parents=True)
    outcome = Outcome(f"{kind} in {folder.name}")
    expected = reference(home, kind)
    seen: set[int] = set()
    for plan in [*plans, None]:
        if plan is not None and (run / "DONE").exists():
            continue
        environment = {"TMPDIR": str(temporary)}
        if isinstance(plan, Plan):
            environment["CHAOS"] = json.dumps(asdict(plan))
        process = world.start(arguments(home, kind, run), **environment)
        end, fall = time.monotonic() + TIMEOUT, plan if isinstance(plan, float) else None
        began = time.monotonic()
        while process.returncode is None:
            seen |= _family(process.pid)
            if fall is not None and time.monotonic() - began > fall:
                with suppress(ProcessLookupError):  # it has just ended, or does not lead its group yet
                    os.killpg(process.pid, signal.SIGKILL)
                    fall = None
            if time.monotonic() > end:
                outcome.problems.append(f"{plan}: hangs")
                world.kill_tree(process)
                break
            time.sleep(0.05)
        if plan is None:
            _, errors = process.wait(10)
            if process.returncode or not (run / "DONE").exists():
                outcome.problems.append(f"cannot finish: {errors[-600:]}")
        else:
            died = process.returncode != 0
            outcome.landed += died
            outcome.kills.append(f"{plan}{'' if died else ': not reached'}")
        outcome.problems += _left_running(seen)
    if not outcome.problems:
        outcome.problems += _differences(run, expected) + _leftovers(run, temporary, seen)
    return outcome


def kill_preparation(folder: Path, plans: list[Plan]) -> Outcome:
    """The same for `python -m data_prep`."""
    outcome = Outcome(f"preparation in {folder.name}")

    def words(root: Path) -> list[str]:
        source = ["source=synthetic", "source.samples=240", "source.samples_per_shard=60", "source.side=8"]
        return [*source, f"root={root}"]

    world.train(words(folder / "whole"), module="data_prep", timeout=TIMEOUT)
    for plan in plans:
        done = world.train(
            words(folder / "killed"), module="data_prep", timeout=TIMEOUT, CHAOS=json.dumps(asdict(plan))
        )
        outcome.landed += done.returncode != 0
        outcome.kills.append(f"{plan}{'' if done.returncode else ': not reached'}")
    done = world.train(words(folder / "killed"), module="data_prep", timeout=TIMEOUT)
    if done.returncode:
        outcome.problems.append(f"cannot finish: {done.stderr[-600:]}")
    both = [{n: file_sha256(folder / r / n) for n in file_names(folder / r)} for r in ("whole", "killed")]
    for name in sorted(both[0].keys() | both[1].keys()):
        if both[0].get(name) != both[1].get(name):
            outcome.problems.append(f"{name} differs from an undisturbed preparation")
    return outcome


def draw(dice: random.Random, kills: int, duration: float) -> list[Plan | float]:
    """So many kills: most at a named place, some at any moment of `duration` seconds."""
    return [dice.uniform(0, duration) if dice.random() < 0.25 else Plan.draw(dice, RANKS) for _ in range(kills)]


def _family(pid: int) -> set[int]:
    try:
        parent = psutil.Process(pid)
        return {pid, *(p.pid for p in parent.children(recursive=True))}
    except psutil.Error:
        return set()


def _left_running(seen: set[int]) -> list[str]:
    end = time.monotonic() + TIMEOUT / 3  # an orphan ends at its next step
    left = seen
    while left and time.monotonic() < end:
        left = {pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"}
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"process {pid} was left running" for pid in left]


def _differences(run: Path, expected: Path) -> list[str]:
    found = []
    lines = [
        [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss")) for r in read_metrics(r)]
        for r in (run, expected)
    ]
    if lines[0] != lines[1]:
        found.append(f"losses differ: {lines[0]} for {lines[1]}")
    for file in sorted((expected / "export").rglob("*.safetensors")):
        ours, theirs = load_file(run / "export" / file.relative_to(expected / "export")), load_file(file)
        if ours.keys() != theirs.keys() or not all(ours[k].equal(theirs[k]) for k in theirs):
            found.append(f"{file.name} differs")
    names = [_names(r) for r in (run, expected)]
    if names[0] != names[1]:
        found.append(f"files differ: {sorted(set(names[0]) ^ set(names[1]))}")
    return found


def _names(run: Path) -> list[str]:
    """Files of a run, its checkpoints by age: ranks whose front end died stop in order, with one more, so older go."""
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    found = []
    for name in file_names(run):
        for age, step in enumerate(reversed(checkpoints)):
            name = name.replace(f"checkpoints/{step}/", f"checkpoints/{age}/")
        found.append(name)
    return sorted(name for name in found if not name.startswith("wandb"))


def _leftovers(run: Path, temporary: Path, seen: set[int]) -> list[str]:
    left = [path for path in temporary.iterdir() if not _of_a_compiler(path)]
    found = [f"{path} was left behind" for path in [*left, *run.glob(".*")]]
    for path in Path("/dev/shm").iterdir() if Path("/dev/shm").is_dir() else ():
        if any(f"_{pid}_" in path.name for pid in seen):
            found.append(f"{path} was left behind")
    shutil.rmtree(temporary, ignore_errors=True)
    return found


def _of_a_compiler(path: Path) -> bool:
    """DeepSpeed's: every start of a rank compiles a few lines, to see whether there is libaio."""
    return path.name.startswith("cc") or (path / "test.c").exists()
