"""What a checkpoint costs the step that writes it: `checkpoint.background` true and false, in turns, tiny model, CPU.

    python -m benchmarks.saving [--every 6] [--saves 10] [key=value ...]

A step lasts from one record of `metrics.jsonl` to the next; the one after a multiple of `checkpoint.every` has the
saving in it. In the background the steps behind it share the machine with the writing, so the steps of a whole interval
are compared too, with those of a run that saves nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from train.measure.tracking import read_metrics

WARM_UP = 6
"""First steps left out."""


def steps(run: Path) -> dict[int, float]:
    """Seconds of each step after the warm-up, by its number."""
    times = {record["step"]: record["unix_time"] for record in read_metrics(run) if "loss" in record}
    return {step: at - times[step - 1] for step, at in times.items() if step > WARM_UP}


def train(folder: Path, name: str, options: argparse.Namespace, *more: str) -> dict[int, float]:
    """Run a training and time its steps."""
    run = folder / name
    total = WARM_UP + options.every * options.saves + 1
    command = ["llm=tiny", f"run_dir={run}", f"stage.steps={total}", "launch.workers=2", "tracking=disabled"]
    command += ["data.val=null", "data.test=null", "launch.threads_per_worker=1", *more, *options.overrides]
    subprocess.run([sys.executable, "-m", "train", *command], check=True, stdout=subprocess.DEVNULL)
    return steps(run)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--every", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="of the training")
    options = parser.parse_args()
    print("| checkpoints | step, ms | step that saves, ms | over a step | interval over one without |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        none = train(Path(folder), "none", options, "checkpoint.every=null")
        print(f"| none | {1000 * median(none.values()):.0f} | | | |", flush=True)
        for name, background in (("in the background", "true"), ("waited for", "false")):
            every = f"checkpoint.every={options.every}"
            found = train(Path(folder), background, options, every, f"checkpoint.background={background}")
            saving = [seconds for step, seconds in found.items() if step % options.every == 1]
            others = [seconds for step, seconds in found.items() if step % options.every != 1]
            print(
                f"| {name} | {1000 * median(others):.0f} | {1000 * median(saving):.0f} "
                f"| {median(saving) / median(others):.2f} | {mean(found.values()) / mean(none.values()):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
