"""`python -m train.tables [runs=outputs] [trials=FILE] [out=FILE]`: the paper's tables, paper | ours | mini.

Looks through all finetunings below `runs` for those that a row describes. Full size is the paper's model (Vicuna-7B,
hidden width 4096): its scores come from RUN/evaluation/benchmarks.json, which `python -m train.benchmark` writes
(`{"scores": {"MMBench": 63.4, ...}}`); without one it says "not run". Mini is any smaller model, scored by
`train.evaluate` on its own data: percent right, mean over seeds with the 95 % interval (of the questions, where there
is one seed), a column for each LLM and test split. The two are never mixed: a mini figure stands in a column of its own
and says nothing of a benchmark. `trials` keeps one line of every small run, so that its directory may go.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from omegaconf import OmegaConf

from common.errors import ConfigError, run_cli
from common.files import read_json, write_atomically
from common.markdown import as_table, plain
from common.options import parse_options
from common.settings import setting
from model.config import parse_types
from train import config as configuration
from train.config import RunConfig
from train.measure import trials as trial_file
from train.measure.paper_tables import PRETRAINING, TABLES, Table
from train.measure.results import BENCHMARKS
from train.measure.trials import Trial
from train.process.run_files import RunDir

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)
# Student's t, two-sided 95 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FULL_WIDTH = 4096
_GENERATOR = {"generator.types": "types", "generator.rank": "rank", "generator.num_blocks": "blocks"}
"""Keys that tables vary, and the trial's names of them."""


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        runs: Folder to look through.
        split: Which evaluation of a mini run counts.
        trials: File with one line of every mini run; those found are added to it. Null: only what is found counts.
        out: Markdown file to write; null: print only.
    """

    runs: str = setting("outputs", path=True)
    split: str = setting("test", choices=("test", "val"))
    trials: str | None = setting(None, path=True)
    out: str | None = setting(None, path=True)


@dataclass
class Run:
    """A finetuning of the paper's size with the scores of benchmarks.

    Attributes:
        facts: What rows want of it: values by configuration key, and the sources of its stage 1.
        benchmarks: Scores of an evaluation harness, by name.
    """

    facts: dict[str, Any]
    benchmarks: dict[str, float]


def find_runs(folder: Path, split: str) -> tuple[list[Run], list[Trial]]:
    """The finished finetunings below `folder`: those of full size that have scores, and all smaller ones.

    A pretraining is no row: the paper scores what stage 2 leaves.
    """
    full, mini = [], []
    for file in sorted(folder.rglob("config.yaml")):
        run = RunDir(file.parent)
        config = configuration.read(file)
        if config.stage.name != "finetune":
            continue
        if (config.llm.architecture or {}).get("hidden_size") != FULL_WIDTH:
            if run.done.exists():
                mini.append(trial_file.of_run(file.parent, split))
        elif (scores := run.evaluation / BENCHMARKS).is_file():
            found = read_json(scores, "run train.benchmark again")["scores"]
            full.append(Run(_facts(config), {str(name): float(value) for name, value in found.items()}))
    return full, mini


def _facts(config: RunConfig) -> dict[str, Any]:
    flat = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(config)))
    facts = {key: OmegaConf.select(flat, key) for key in ("connector.name", *_GENERATOR)}
    facts["generator.types"] = ",".join(parse_types(config.generator.types))
    before = RunDir(Path(config.init_from or "")).config
    facts[PRETRAINING] = [source.path for source in configuration.read(before).data.train] if before.is_file() else []
    return facts


def _trial_facts(trial: Trial) -> dict[str, Any]:
    return {"connector.name": trial.connector} | {key: getattr(trial, name) for key, name in _GENERATOR.items()}


def matches(facts: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a run is what a row describes; a mini run (without `PRETRAINING`) is so whatever stage 1 read."""
    for key, value in wanted.items():
        if key == PRETRAINING:
            if key in facts and not any(value in source for source in facts[key]):
                return False
        elif facts[key] != (",".join(parse_types(value)) if key == "generator.types" else value):
            return False
    return True


def of_row(table: Table, wanted: dict[str, Any], runs: list[T], facts: Callable[[T], dict[str, Any]]) -> list[T]:
    """The runs of a row. What the table does not vary is as in most runs: a point has one difference."""
    found = [run for run in runs if matches(facts(run), wanted)]
    if wanted["connector.name"] != "vlora":
        return found
    varied = {key for row in table.rows for key in row.wanted}
    peers = [run for run in runs if facts(run)["connector.name"] == "vlora"]
    for key in _GENERATOR.keys() - varied:
        most = usual_value([facts(run)[key] for run in peers])
        found = [run for run in found if facts(run)[key] == most]
    return found


def usual_value(values: list[H]) -> H | None:
    """The most frequent; of equally frequent ones the first; of none, None."""
    return Counter(values).most_common(1)[0][0] if values else None


def columns(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The scored trials by setting."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.percent is not None:
            found.setdefault(trial.setting, []).append(trial)
    return found


def of_table(table: Table, trials: list[Trial]) -> dict[str, list[Trial]]:
    """The trials of every row, by its name, all of one length.

    A table of connectors takes each at its own rates, those with the lowest validation loss; one that varies the
    generator takes the rates that most of its trials have.
    """
    length = usual_value([_length(trial) for trial in trials])
    equal = [trial for trial in trials if _length(trial) == length]
    found = {row.name: of_row(table, row.wanted, equal, _trial_facts) if row.mini else [] for row in table.rows}
    if len({row.wanted["connector.name"] for row in table.rows}) > 1:
        return {name: [t for t in some if _rates(t) == _best_rates(some)] for name, some in found.items()}
    usual = usual_value([_rates(trial) for some in found.values() for trial in some])
    return {name: [t for t in some if _rates(t) == usual] for name, some in found.items()}


def _best_rates(trials: list[Trial]) -> str | None:
    """Of the trials of one connector: the rates with the lowest mean validation loss; without one, the usual rates."""
    losses: dict[str, list[float]] = {}
    for trial in trials:
        if trial.val_loss is not None:
            losses.setdefault(_rates(trial), []).append(trial.val_loss)
    return min(losses, key=lambda rates: mean(losses[rates])) if losses else usual_value([_rates(t) for t in trials])


def interval(trials: list[Trial]) -> str:
    """Percent right: mean over seeds with its 95 % interval; of one run, its own."""
    values = [trial.percent for trial in trials if trial.percent is not None]
    if len(values) == 1:
        return f"{values[0]:.1f} ({trials[0].low:.1f}-{trials[0].high:.1f}, 1 seed)"
    middle = mean(values)
    half = _T[min(len(values) - 2, len(_T) - 1)] * stdev(values) / math.sqrt(len(values))
    return f"{middle:.1f} ({middle - half:.1f}-{middle + half:.1f}, {len(values)} seeds)"


def render(table: Table, runs: list[Run], mini: dict[str, list[Trial]]) -> str:
    """One table as Markdown."""
    shown = {name: of_table(table, trials) for name, trials in mini.items()} if any(r.mini for r in table.rows) else {}
    heads = [table.title, *(f"{name}: paper" for name in table.benchmarks), "ours, full size"]
    for name, filled in shown.items():
        rates = {_rates(trial) for some in filled.values() for trial in some}
        heads.append(f"mini, % right: {name}" + (f"; {rates.pop()}" if len(rates) == 1 else ""))
    rows = []
    for row in table.rows:
        cells = [row.name, *([f"{score:g}" for score in row.scores] or ["-"] * len(table.benchmarks))]
        ours = of_row(table, row.wanted, runs, lambda run: run.facts)
        cells.append("; ".join(_benchmarks(run, table) for run in ours if run.benchmarks) or "not run")
        for filled in shown.values():
            small = filled[row.name]
            cells.append(interval(small) if small else "not run" if row.mini else "-")
        rows.append(cells)
    return f"## Table {table.number}: {table.title}\n\n`{table.command}`\n\n{as_table(_plain(heads, *rows))}"


def _length(trial: Trial) -> Hashable:
    return *trial.samples, trial.questions


def _benchmarks(run: Run, table: Table) -> str:
    return ", ".join(f"{name} {run.benchmarks[name]:g}" for name in table.benchmarks if name in run.benchmarks)


def _plain(*rows: list[str]) -> list[list[str]]:
    return [[plain(cell) for cell in row] for row in rows]


def _images(trial: Trial) -> str:
    return ", ".join(map(str, trial.samples))


def _rates(trial: Trial) -> str:
    """Of stage 2, as text; those of a generator's parts only where there is one."""
    without = () if trial.connector == "vlora" else ("heads", "output_factors")
    return ", ".join(f"{name} {rate:g}" for name, rate in trial.rates[-1].items() if name not in without)


def _connectors(trials: list[Trial]) -> dict[tuple[str, Hashable], list[Trial]]:
    """The trials of each connector and length; with a generator those of the usual one."""
    systems = TABLES[0]
    found: dict[tuple[str, Hashable], list[Trial]] = {}
    for row in systems.rows:
        for trial in of_row(systems, row.wanted, trials, _trial_facts) if row.mini else ():
            found.setdefault((trial.connector, _length(trial)), []).append(trial)
    return found


def render_connectors(mini: dict[str, list[Trial]]) -> str:
    """The connectors' own table: what each costs, however long it trained."""
    heads = ["mini", "connector", "images: stage 1, stage 2", "questions an image", "rates of stage 2"]
    heads += ["minutes of training", "% right"]
    rows = []
    for setting_, trials in mini.items():
        for (connector, _), all_ in _connectors(trials).items():
            same = [trial for trial in all_ if _rates(trial) == _best_rates(all_)]
            asked = "all" if same[0].questions is None else str(same[0].questions)
            minutes = f"{mean(t.seconds for t in same) / 60:.1f}"
            rows.append([setting_, connector, _images(same[0]), asked, _rates(same[0]), minutes, interval(same)])
    title = "## The connectors at equal samples and at equal time"
    return f"{title}\n\n{as_table(_plain(heads, *rows))}" if rows else f"{title}\n\nNot run."


def render_rates(trials: list[Trial]) -> str:
    """Validation loss of every rate that was tried, where one seed tried several."""
    heads = ["mini", "connector", "images: stage 1, stage 2", "seed", "rates of stage 2", "validation loss"]
    rows = []
    for setting_ in dict.fromkeys(trial.setting for trial in trials):
        here = [trial for trial in trials if trial.setting == setting_ and trial.val_loss is not None]
        for (connector, _), same in _connectors(here).items():
            for seed in sorted({trial.seed for trial in same}):
                tried = [trial for trial in same if trial.seed == seed]
                if len(tried) > 1:
                    rows += [
                        [setting_, connector, _images(t), str(seed), _rates(t), f"{t.val_loss:.4f}"] for t in tried
                    ]
    title = "## Rates that were tried"
    return f"{title}\n\n{as_table(_plain(heads, *rows))}" if rows else f"{title}\n\nNone."


def main() -> int:
    """Print the tables, and write them."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    folder = Path(options.runs)
    if not folder.is_dir():
        raise ConfigError(f"runs={folder}: no such folder")
    for name, path in (("trials", options.trials), ("out", options.out)):
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise ConfigError(f"{name}={path}: give a file in a folder that is there")
    runs, found = find_runs(folder, options.split)
    file = None if options.trials is None else Path(options.trials)
    trials = trial_file.merge(trial_file.read(file) if file is not None and file.exists() else [], found)
    if file is not None:
        trial_file.write(file, trials)
    mini = columns(trials)
    text = "\n\n".join(
        [
            "# The paper's tables",
            f"Made by `python -m train.tables` from {len(runs)} runs at full size and {sum(map(len, mini.values()))} "
            "mini ones, all after stage 2. The columns are never mixed: mini models answer their own data, not the "
            "benchmarks.",
            *(render(table, runs, mini) for table in TABLES),
            render_connectors(mini),
            render_rates(trials),
        ]
    )
    print(text)
    if options.out is not None:
        write_atomically(Path(options.out), text + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
