"""`python -m train.tables [runs=outputs] [out=FILE]`: the paper's tables as paper | ours at full size | mini.

Looks through all finished runs below `runs` for those that a row describes. Full size is the paper's model (Vicuna-7B,
hidden width 4096): its scores come from RUN/evaluation/benchmarks.json, which `python -m train.benchmark` writes
(`{"scores": {"MMBench": 63.4, ...}}`); without one it says "not run". Mini is any smaller model, scored by
`train.evaluate` on its own data: percent right, mean over seeds with the 95 % interval (of the questions, where there
is one seed). The two are never mixed: a mini figure stands in a column of its own and says nothing of a benchmark.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from omegaconf import OmegaConf

from common.errors import ConfigError, run_cli
from common.files import read_json, write_atomically
from common.markdown import plain
from common.options import parse_options
from common.settings import setting
from model.config import parse_types
from train import config as configuration
from train.config import RunConfig
from train.measure.paper_tables import TABLES, Table
from train.process.run_files import RunDir

# Student's t, two-sided 95 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FULL_WIDTH = 4096


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        runs: Folder to look through.
        split: Which evaluation of a mini run counts.
        out: Markdown file to write; null: print only.
    """

    runs: str = setting("outputs", path=True)
    split: str = "test"
    out: str | None = setting(None, path=True)


@dataclass
class Run:
    """A finished run with a score.

    Attributes:
        config: Its configuration.
        full: Whether it is of the paper's size.
        benchmarks: Scores of an evaluation harness, by name.
        accuracy: Percent right and its 95 % interval on its own data, or None.
    """

    config: RunConfig
    full: bool
    benchmarks: dict[str, float] = field(default_factory=dict)
    accuracy: tuple[float, float, float] | None = None


def find_runs(folder: Path, split: str) -> list[Run]:
    """All runs below `folder` that have a score."""
    found = []
    for file in sorted(folder.rglob("config.yaml")):
        run = file.parent
        folder = RunDir(run).evaluation
        scores, scored = folder / "benchmarks.json", folder / f"{split}-real.json"
        if not (scores.is_file() or scored.is_file()):
            continue
        config = configuration.read(file)
        one = Run(config, _width(config) == FULL_WIDTH)
        if scores.is_file():
            found_scores = read_json(scores, "run train.benchmark again")["scores"]
            one.benchmarks = {str(name): float(value) for name, value in found_scores.items()}
        if scored.is_file():
            overall = read_json(scored, "evaluate the run again")["accuracy"]["overall"]
            one.accuracy = (overall["percent"], overall["low"], overall["high"])
        found.append(one)
    return found


def _width(config: RunConfig) -> int | None:
    return (config.llm.architecture or {}).get("hidden_size")


def matches(config: RunConfig, wanted: dict[str, Any]) -> bool:
    """Whether a run is what a row describes."""
    flat = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(config)))
    for key, value in wanted.items():
        if key == "pretraining data":
            sources = [source.path for source in config.data.train]
            # A finetuning does not say what its pretraining read: its recipe does not differ.
            if config.stage.name == "pretrain" and not any(value in source for source in sources):
                return False
        elif key == "generator.types":
            if parse_types(config.generator.types) != parse_types(value):
                return False
        elif OmegaConf.select(flat, key) != value:
            return False
    return True


def _varied(table: Table) -> set[str]:
    """Keys that the rows of a table differ in."""
    return {key for _, _, wanted in table.rows for key in wanted if key.startswith("generator.")}


def of_row(table: Table, wanted: dict[str, Any], runs: list[Run]) -> list[Run]:
    """The runs of a row. What the table does not vary is as in most runs: a point has one difference."""
    found = [run for run in runs if matches(run.config, wanted)]
    keys = {"generator.types", "generator.rank", "generator.num_blocks"} - _varied(table)
    if wanted["connector.name"] != "vlora" or not found:
        return found
    peers = [run for run in runs if run.config.connector.name == "vlora"]
    usual = _most_common([_values(run, keys) for run in peers])
    return [run for run in found if _values(run, keys) == usual]


def _values(run: Run, keys: set[str]) -> tuple[str, ...]:
    generator = run.config.generator
    known = {"generator.types": "".join(parse_types(generator.types)), "generator.rank": str(generator.rank)}
    known["generator.num_blocks"] = str(generator.num_blocks)
    return tuple(known[key] for key in sorted(keys))


def _most_common(values: list[tuple[str, ...]]) -> tuple[str, ...]:
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for value in values:
        counts[value] += 1
    return max(counts, key=lambda value: counts[value])


def interval(scores: list[tuple[float, float, float]]) -> str:
    """Mean over seeds with its 95 % interval; of one run, its own."""
    if len(scores) == 1:
        percent, low, high = scores[0]
        return f"{percent:.1f} ({low:.1f}-{high:.1f}, 1 seed)"
    values = [percent for percent, _, _ in scores]
    middle = mean(values)
    half = _T[min(len(values) - 2, len(_T) - 1)] * stdev(values) / math.sqrt(len(values))
    return f"{middle:.1f} ({middle - half:.1f}-{middle + half:.1f}, {len(values)} seeds)"


def render(table: Table, runs: list[Run]) -> str:
    """One table as Markdown."""
    full, mini = ([run for run in runs if run.full is size] for size in (True, False))
    heads = [table.title, *(f"{name}: paper" for name in table.benchmarks), "ours, full size", "mini: % right"]
    lines = [f"## Table {table.number}: {table.title}", "", f"`{table.command}`", ""]
    lines += ["| " + " | ".join(map(plain, heads)) + " |", "|" + " --- |" * len(heads)]
    for name, scores, wanted in table.rows:
        printed = [f"{score:g}" for score in scores] or ["-"] * len(table.benchmarks)
        ours = of_row(table, wanted, full)
        shown = "; ".join(_benchmarks(run, table) for run in ours if run.benchmarks) or "not run"
        small = [run.accuracy for run in of_row(table, wanted, mini) if run.accuracy and run.config.data.test]
        cells = [name, *printed, shown, interval(small) if small else "not run"]
        lines.append("| " + " | ".join(map(plain, cells)) + " |")
    return "\n".join(lines)


def _benchmarks(run: Run, table: Table) -> str:
    return ", ".join(f"{name} {run.benchmarks[name]:g}" for name in table.benchmarks if name in run.benchmarks)


def main() -> int:
    """Print the tables, and write them."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    folder = Path(options.runs)
    if not folder.is_dir():
        raise ConfigError(f"runs={folder}: no such folder")
    if options.out is not None and (Path(options.out).is_dir() or not Path(options.out).parent.is_dir()):
        raise ConfigError(f"out={options.out}: give a file in a folder that is there")
    # A pretraining that was scored is no row: the paper scores what stage 2 leaves.
    runs = [run for run in find_runs(folder, options.split) if run.config.stage.name == "finetune"]
    full = sum(run.full for run in runs)
    text = "\n\n".join(
        [
            "# The paper's tables",
            f"Made by `python -m train.tables` from {full} runs at full size and {len(runs) - full} mini ones, all "
            "after stage 2. The columns are never mixed: mini models answer their own data, not the benchmarks.",
            *(render(table, runs) for table in TABLES),
        ]
    )
    print(text)
    if options.out is not None:
        write_atomically(Path(options.out), text + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
