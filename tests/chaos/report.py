"""`python -m tests.chaos.report RUN`: the figures that a report takes from a run, as one line."""

import json
import sys
from pathlib import Path

from common.errors import run_cli
from train.measure.results import run_identity, stage_figures
from train.measure.tracking import read_metrics


def main() -> int:
    run = Path(sys.argv[1])
    figures = stage_figures(run)
    losses = [(r["step"], r.get("loss"), r.get("val_loss")) for r in read_metrics(run)]
    print(json.dumps([figures["steps"], figures["final_loss"], losses, run_identity(run)["git_commit"]]))
    return 0


if __name__ == "__main__":
    run_cli(main)
