"""Validation during a stage: the loss on held-out data, a table of answers, and which step was the best."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.files import write_json
from train.config import RunConfig
from train.data import EvalLoader
from train.engine.checkpoint import Progress
from train.engine.engine import Engine
from train.measure import samples
from train.measure.tracking import Tracker
from train.process import distributed
from train.process.run_files import RunDir


@dataclass
class Validation:
    """Looks at the model of a stage, every `evaluation.every` steps and at its end.

    Attributes:
        config: The run's configuration.
        run_dir: Its directory.
        engine: The engine.
        questions: Prompts of the sample table, the same on all ranks.
        held_out: Rows of the validation loss, shared among the ranks.
        tracker: Takes the results; on rank 0 only.
        facts: Of the run; those on rank 0 are written anew when there is a better step.
        loss: The last one, in nats per target.
    """

    config: RunConfig
    run_dir: Path
    engine: Engine
    questions: EvalLoader
    held_out: EvalLoader
    tracker: Tracker | None
    facts: dict[str, Any]
    loss: float = float("nan")

    def run(self, progress: Progress) -> bool:
        """Validate this step; whether its loss is lower than that of every step before, noted in `progress`.

        Training goes on as it would have without. Collective.
        """
        rows = samples.predict(self.engine, self.questions, self.config)
        self.loss = validation_loss(self.engine, self.held_out)
        if self.tracker is not None:
            samples.write(self.run_dir, progress.step, rows, self.tracker)
            self.tracker.log(progress.step, {"val_loss": self.loss})
        better = progress.best_loss is None or self.loss < progress.best_loss
        if better:
            progress.best_step, progress.best_loss = progress.step, self.loss
        if distributed.rank() == 0:
            write_facts(self.run_dir, self.facts, progress)
        return better


def write_facts(run_dir: Path, facts: dict[str, Any], progress: Progress) -> None:
    """Write what a run found out, with its best step where there is one."""
    best = {"best": {"step": progress.best_step, "val_loss": progress.best_loss}} if progress.best_step else {}
    write_json(RunDir(run_dir).facts, facts | best)


@torch.no_grad()
def validation_loss(engine: Engine, loader: EvalLoader) -> float:
    """Mean loss per target over a held-out split, in nats. Collective."""
    engine.model.eval()
    loss = targets = 0.0
    for evaluation in loader:
        output = engine.forward(evaluation.batch.to(engine.device))
        loss, targets = loss + output.loss_sum.item(), targets + output.n_targets
    engine.model.train()
    loss, targets = distributed.reduce([loss, targets], engine.device)
    return loss / targets
