"""Wrong words, files and environments for every command: one line that says what is wrong, or it works; never more.

Each case takes a command line that works and spoils one thing of it, chosen by the seed: the value of a key (any that
the command has), a word, a path, a file of the model, of the run or of the data, or a variable of the environment.
"""

from __future__ import annotations

import importlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import settings
from data_prep import config as preparation
from tests.chaos.damage import KINDS, Bench, spoil
from tests.chaos.kills import TIMEOUT
from tests.train import world
from train.config import RunConfig

VALUES = [
    "", " ", "-1", "0", "1.5", "nan", "inf", "1e400", "99999999999999999999", "true", "null", "[]", "{}", "[1,2]",
    "text", "a=b", "é图", "(", "'", '"', "${oc.env:HOME}", "${", "!!python/object:os.system", "&a [*a]", "a\nb", "~",
    "*", "x" * 5000, "{a: {b: c}}", "\\", "0x10", "1_000", "--", "#", "a,b", "choice(1,2)",
]  # fmt: skip
WORDS = [
    "",
    "=",
    "=1",
    "x",
    "nothing=1",
    "--nothing",
    "-",
    "a.b.c=1",
    "+x=1",
    "~seed",
    "++run_dir=a",
    "@",
    "é=1",
    "seed==1",
]
ENVIRONMENT = {
    "HOME": ["/nonexistent", "/proc", ""],
    "TMPDIR": ["/nonexistent"],
    "LC_ALL": ["C", "xx_XX.nothing", "POSIX"],
    "OMP_NUM_THREADS": ["text", "-1", "0"],
    "CUDA_VISIBLE_DEVICES": ["text", "-1", "99"],
    "WORLD_SIZE": ["text", "3"],
    "RANK": ["7"],
    "PYTHONIOENCODING": ["ascii"],
    "VLORA_CACHE": ["/nonexistent", "/proc/1"],
    "HF_HOME": ["/proc"],
    "COLUMNS": ["text", "0", "1"],
    "SLURM_PROCID": ["text"],
    "TERM": [""],
    "MPLBACKEND": ["nothing"],
}


@dataclass(frozen=True)
class Input:
    """One spoiled command line and how it ended: one of `GOOD`, or `traceback`, `hang`, `unclear`."""

    module: str
    what: str
    how: str
    detail: str


GOOD = ("refused", "works")


class Inputs:
    """The commands in a world of their own, of which each case gets a copy.

    Args:
        folder: Where all of it lies; kept from call to call.
    """

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)
        self.place = folder / "case"

    def _commands(self) -> dict[str, tuple[Callable[[], type], list[str]]]:
        """By module: the keys that it has, and words that it takes."""
        at, image = self.place, f"image={self.place}/red.png"
        run = f"run={at}/run"
        words = [w.replace(str(self.bench.home), str(at / "world")) for w in self.bench.words(at / "new")]

        def options(module: str) -> Callable[[], type]:
            return lambda: importlib.import_module(module).Options

        # The last two take folders, not keys: any key is one that is not there.
        return {
            "train": (lambda: RunConfig, [*words, "check=true"]),
            "train.evaluate": (options("train.evaluate"), [run, "split=squares/val", "max_samples=2"]),
            "train.adapter": (options("train.adapter"), [run, image, f"out={at}/adapter", "types=q,k,v,o"]),
            "train.report": (options("train.report"), [run, f"out={at}/report"]),
            "train.tables": (options("train.tables"), [f"runs={at}", f"out={at}/tables.md"]),
            "train.official": (options("train.official"), [run, f"out={at}/official"]),
            "train.flops": (options("train.flops"), [f"out={at}/flops"]),
            "serve.ask": (options("serve.ask"), [run, image, "question=what color is the shape?"]),
            "data_prep": (
                lambda: preparation.schema_of("synthetic"),
                ["source=synthetic", "source.samples=20", "source.side=8", f"root={at}/prepared", "name=s"],
            ),
            "data_prep.verify": (options("train.report"), [f"{self.bench.folder}/data/squares/train"]),
            "train.sweep_report": (options("train.report"), [f"{at}"]),
        }

    def run(self, number: int, seed: int) -> Input:
        """Spoil one thing and run the command."""
        dice = random.Random(f"{seed}/{number}")
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        shutil.copytree(self.bench.base, self.place / "run")
        for part in ("llm", "vision"):
            shutil.copytree(self.bench.home / part, self.place / "world" / part)
        shutil.copytree(self.bench.folder / "data", self.place / "world" / "data")
        shutil.copy(self.bench.folder / "red.png", self.place)
        module, (schema, words) = dice.choice(sorted(self._commands().items()))
        words, environment = list(words), {}
        kind = dice.choice(["value", "value", "value", "word", "path", "file", "file", "environment"])
        match kind:
            case "value":
                key: Any = dice.choice([key for key, *_ in settings.keys(schema())])
                value = dice.choice(VALUES)
                words = [word for word in words if word.partition("=")[0] != key] + [f"{key}={value}"]
                what = f"{key}={value[:40]!r}"
            case "word":
                what = dice.choice(WORDS)
                words.insert(dice.randrange(len(words) + 1), what)
            case "path":
                at = dice.choice([n for n, word in enumerate(words) if str(self.place) in word] or [0])
                other = dice.choice(
                    ["/nonexistent/x", "/dev/null", "/proc/self", str(self.place / "red.png"), str(self.place)]
                )
                words[at] = f"{words[at].partition('=')[0]}={other}" if "=" in words[at] else other
                what = words[at]
            case "file":
                files = sorted(path for path in self.place.rglob("*") if path.is_file() and "wandb" not in path.parts)
                file, damage = dice.choice(files), dice.choice(KINDS)
                spoil(file, damage, dice)
                what = f"{file.relative_to(self.place)} {damage}"
            case _:
                name = dice.choice(sorted(ENVIRONMENT))
                environment[name] = dice.choice(ENVIRONMENT[name])
                what = f"{name}={environment[name]}"
        try:
            done = world.train(words, module=module, timeout=TIMEOUT, **environment)
        except TimeoutError as error:
            return Input(module, what, "hang", str(error))
        said = [
            line for line in done.stderr.splitlines() if line.startswith(("error: ", "usage: ")) or ": error: " in line
        ]
        if "Traceback" in done.stderr or "Traceback" in done.stdout:
            return Input(module, what, "traceback", done.stderr[-1500:])
        if done.returncode:
            return Input(module, what, "refused" if said else "unclear", " ".join(said) or done.stderr[-600:])
        return Input(module, what, "works", "")
