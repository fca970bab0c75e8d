"""Every file of a run directory and of a prepared split x every kind of damage x everything that reads it.

Generated from the files that are there. Each case must end in one of four ways: *refused* (one line that names the
file), *repaired* (said, and the result is that of sound files), *harmless* (the result is that of sound files), or
*told* (a report of what is left, with a warning that names the file and what it lacks).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.files import file_names, file_sha256
from tests.chaos.kills import TIMEOUT
from tests.train import world

KINDS = ("gone", "empty", "cut", "bit", "type", "binary", "directory")
RUN_ACTIONS = ("resume", "evaluate", "adapter", "report")
SPLIT_ACTIONS = ("train", "evaluate", "prepare")
GOOD = ("refused", "repaired", "harmless", "told")


@dataclass(frozen=True)
class Case:
    """One file, one damage, one reader."""

    file: str
    kind: str
    action: str

    def __str__(self) -> str:
        return f"{self.file} {self.kind}: {self.action}"


@dataclass(frozen=True)
class Result:
    """How a case ended: one of `GOOD`; or `silent`, `traceback`, `hang`, or `unclear`: refused, the file not named."""

    case: Case
    how: str
    detail: str = ""


class Bench:
    """A finished run and a prepared data set, each case on a copy of its own.

    Args:
        folder: Where all of it lies; kept from call to call.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, self.base = folder / "world", folder / "base"
        if not (self.home / "llm").exists():
            world.make(self.home)
            done = world.train(self.words(self.base), timeout=TIMEOUT)
            if done.returncode:
                raise RuntimeError(done.stderr)
            (self.base / "DONE").unlink()
            (self.folder / "red.png").write_bytes(world.picture(world.COLORS["red"]))
            done = world.train(self._prepare(self.home / "data"), module="data_prep", timeout=TIMEOUT)
            if done.returncode:
                raise RuntimeError(done.stderr)
            # What the configurations name is a link, to the copy that the case at hand may damage.
            (self.home / "data").rename(folder / "data")
        self._expected: dict[str, object] = {}

    def cases(self) -> list[Case]:
        """All of them."""
        run = [n for n in file_names(self.base) if not n.startswith(("wandb/", "evaluation/"))]
        split = [f"split/{n}" for n in file_names(self.folder / "data" / "synthetic")]
        train = [f"squares/{n}" for n in file_names(self.folder / "data" / "squares")]
        out = [Case(f"run/{n}", kind, action) for n in run for kind in KINDS for action in RUN_ACTIONS]
        out += [Case(n, kind, "prepare") for n in split for kind in KINDS]
        return out + [Case(n, kind, action) for n in train for kind in KINDS for action in ("train", "evaluate")]

    def run(self, case: Case, seed: int = 0) -> Result:
        """Damage a copy and read it."""
        sound = self._sound(case.action)
        copy = self._copy()
        place = {"run": copy / "run", "split": copy / "data/synthetic", "squares": copy / "data/squares"}
        room, _, name = case.file.partition("/")
        spoil(place[room] / name, case.kind, random.Random(f"{case}{seed}"))
        try:
            done, result = self._act(case.action, copy)
        except TimeoutError as error:
            return Result(case, "hang", str(error))
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if "Traceback" in done.stderr:
            return Result(case, "traceback", done.stderr[-800:])
        stem = re.sub(r"\..*", "", Path(name).name)
        if done.returncode:
            named = len(errors) == 1 and (Path(name).name in errors[0] or stem in errors[0])
            return Result(case, "refused" if named else "unclear", " ".join(errors) or done.stderr[-300:])
        said = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        if result != sound:
            if case.action == "report" and any(case.file in line and "lacks" in line for line in said):
                return Result(case, "told", " ".join(said))
            return Result(case, "silent", f"{result} for {sound}; {done.stderr[-300:]}")
        return Result(case, "repaired" if said else "harmless", " ".join(said))

    def _sound(self, action: str) -> object:
        if action not in self._expected:
            done, self._expected[action] = self._act(action, self._copy())
            if done.returncode:
                raise RuntimeError(done.stderr)
        return self._expected[action]

    def _copy(self) -> Path:
        copy, data = self.folder / "copy", self.home / "data"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.base, copy / "run")
        shutil.copytree(self.folder / "data", copy / "data")
        data.unlink(missing_ok=True)
        data.symlink_to(copy / "data")
        return copy

    def _act(self, action: str, copy: Path):
        """Run one reader; its process and what it made."""
        run, data = copy / "run", copy / "data"
        match action:
            case "resume":
                done = world.train(self.words(run), timeout=TIMEOUT)
                files = [run / "export/model.safetensors"]
            case "train":
                words = [word for word in self.words(copy / "new") if not word.startswith("stage.steps")]
                done = world.train([*words, "stage.steps=2"], timeout=TIMEOUT)
                files = [copy / "new/export/model.safetensors"]
            case "evaluate":
                done = world.train([f"run={run}", "split=squares/val"], module="train.evaluate", timeout=TIMEOUT)
                files = [run / "evaluation/squares-val-real.jsonl"]
            case "adapter":
                words = [f"run={run}", f"image={self.folder}/red.png", f"out={copy}/adapter", "types=q,k,v,o"]
                done = world.train(words, module="train.adapter", timeout=TIMEOUT)
                files = [copy / "adapter/adapter_model.safetensors"]
            case "report":
                done = world.train([str(run)], module="tests.chaos.report", timeout=TIMEOUT)
                return done, done.stdout.strip().splitlines()[-1:]
            case "prepare":
                done = world.train(self._prepare(data), module="data_prep", timeout=TIMEOUT)
                folder = data / "synthetic"
                return done, {n: file_sha256(folder / n) for n in file_names(folder)}
        return done, [file_sha256(file) if file.is_file() else None for file in files]

    def words(self, run: Path) -> list[str]:
        """A short run in this world."""
        return world.overrides(
            self.home, run, "stage.steps=4", "checkpoint.every=2", "launch.workers=1", "data.val=squares/val",
            "tracking.num_samples=2",
        )  # fmt: skip

    def _prepare(self, root: Path) -> list[str]:
        source = ["source=synthetic", "source.samples=60", "source.samples_per_shard=30", "source.side=8"]
        return [*source, f"root={root}", "name=synthetic"]


def spoil(file: Path, kind: str, dice: random.Random) -> None:
    """Damage a file."""
    content = bytearray(file.read_bytes())
    match kind:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[: len(content) * 2 // 3])
        case "bit":
            if content:
                content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(content)
        case "type":
            file.write_text(json.dumps(["another", {"type": 1}]))
        case "binary":
            file.write_bytes(b"\x89\xff\xfe\0" + dice.randbytes(300))
        case "directory":
            file.unlink()
            file.mkdir()
