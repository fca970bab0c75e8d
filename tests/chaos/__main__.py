"""`python -m tests.chaos kills|damage|inputs|soak`: the bench for what goes wrong. Prints every case and a summary.

    python -m tests.chaos kills --count 200 --seed 0      # that land: in each run one to five in a row
    python -m tests.chaos kills --saves --count 30        # only while checkpoints are written (in the background)
    python -m tests.chaos damage                          # the whole matrix; --sample 40 for a part of it
    python -m tests.chaos inputs --count 400 --seed 0     # one thing wrong in a command line that works
    python -m tests.chaos soak --steps 5000 --kills 2

The exit code is 1 when anything diverged. `--only` repeats cases: a number of `kills` or `inputs`, or a piece of the
name of a damage.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos import damage, inputs, kills, soak
from tests.chaos.points import SAVING
from tests.train import world


def run_kills(options: argparse.Namespace, folder: Path) -> int:
    """Random kills, one to five in a row per run, three runs of training for one of data preparation."""
    home = folder / "world"
    if not (home / "llm").exists():
        world.make(home)
    began = time.monotonic()
    kills.reference(home, "pretrain")
    duration = time.monotonic() - began + 2
    landed = wrong = runs = planned = 0
    for number in [int(options.only)] if options.only else itertools.count():
        if landed >= options.count:
            break
        dice = random.Random(f"{options.seed}/{number}")
        kind = dice.choice(["pretrain", "finetune", "cached", *([] if options.saves else ["preparation"])])
        count = dice.randint(1, 5)
        place = folder / f"run-{number}"
        shutil.rmtree(place, ignore_errors=True)
        if kind == "preparation":
            outcome = kills.kill_preparation(place, [kills.Plan.draw(dice, 0) for _ in range(count)])
        else:
            if options.saves:
                plans = [kills.Plan.draw(dice, kills.RANKS, SAVING) for _ in range(count)]
            else:
                plans = kills.draw(dice, count, duration)
            outcome = kills.kill_run(home, place, kind, plans)
        runs, planned = runs + 1, planned + len(outcome.kills)
        landed, wrong = landed + outcome.landed, wrong + bool(outcome.problems)
        print(
            f"{number} {outcome.name}: {'DIVERGED' if outcome.problems else 'bit for bit'}", *outcome.kills, sep="\n  "
        )
        for problem in outcome.problems:
            print(f"  problem: {problem}")
        sys.stdout.flush()
        if not outcome.problems:
            shutil.rmtree(place)
    print(f"kills: {landed} of {planned} landed in {runs} runs, {wrong} runs diverged, seed {options.seed}")
    return wrong


def run_damage(options: argparse.Namespace, folder: Path) -> int:
    """The damage matrix."""
    bench = damage.Bench(folder)
    cases = [case for case in bench.cases() if not options.only or options.only in str(case)]
    total, cases = len(cases), random.Random(options.seed).sample(cases, min(options.sample or len(cases), len(cases)))
    counts: Counter[str] = Counter()
    for number, case in enumerate(cases, 1):
        result = bench.run(case, options.seed)
        counts[result.how] += 1
        if result.how not in damage.GOOD or options.verbose:
            print(f"{case}: {result.how}: {result.detail}", flush=True)
        if number % 20 == 0 or number == len(cases):  # in random order, so a part stands for the whole
            found = ", ".join(f"{n} {how}" for how, n in counts.most_common())
            print(f"damage: {number} of {total} cases, seed {options.seed}: {found}", flush=True)
    return sum(n for how, n in counts.items() if how not in damage.GOOD)


def run_inputs(options: argparse.Namespace, folder: Path) -> int:
    """Bad input."""
    (folder / "here").mkdir(exist_ok=True)
    os.chdir(folder / "here")  # a spoiled path is made where nothing of ours is
    bench = inputs.Inputs(folder)
    counts: Counter[str] = Counter()
    numbers = [int(options.only)] if options.only else range(options.count)
    for tried, number in enumerate(numbers, 1):
        result = bench.run(number, options.seed)
        counts[result.how] += 1
        if result.how not in inputs.GOOD or options.verbose:
            print(f"{number} {result.module}: {result.what}: {result.how}: {result.detail}", flush=True)
        if tried % 20 == 0 or tried == len(numbers):
            found = ", ".join(f"{n} {how}" for how, n in counts.most_common())
            print(f"inputs: {tried} of {len(numbers)}, seed {options.seed}: {found}", flush=True)
    return sum(n for how, n in counts.items() if how not in inputs.GOOD)


def run_soak(options: argparse.Namespace, folder: Path) -> int:
    """The long run."""
    home = folder / "world"
    if not (home / "llm").exists():
        world.make(home)
    print("\n".join(soak.soak(home, folder / "soak", options.steps, options.kills)))
    return 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "damage", "inputs", "soak"))
    parser.add_argument("--count", type=int, default=20, help="kills that land, or inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only this case")
    parser.add_argument("--saves", action="store_true", help="kills only while a checkpoint is written")
    parser.add_argument("--sample", type=int, help="so many random cases of the damage matrix; default all")
    parser.add_argument("--steps", type=int, default=5000, help="of the soak")
    parser.add_argument("--kills", type=int, default=2, help="during the soak")
    parser.add_argument("--verbose", action="store_true", help="print the good cases of the damage matrix too")
    parser.add_argument("--folder", type=Path, help="where everything lies; default a temporary one, removed")
    options = parser.parse_args()
    what = {"kills": run_kills, "damage": run_damage, "inputs": run_inputs, "soak": run_soak}[options.what]
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        return bool(what(options, options.folder.absolute()))
    with tempfile.TemporaryDirectory() as folder:
        return bool(what(options, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
