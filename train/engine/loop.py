"""The training loop: steps, checkpoints, stop requests; observers see every step's record."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from data_prep.store.errors import CorruptShardError
from model.generator.weights import PerceptualWeights
from train.config import RunConfig
from train.data import TrainLoader
from train.engine import checkpoint, finite
from train.engine.checkpoint import CheckpointError, Progress
from train.engine.engine import Engine
from train.engine.records import Counts, Recorder, Trained
from train.engine.saving import Saver
from train.engine.validation import Validation
from train.measure.profiling import traced
from train.measure.timing import StepTimer
from train.process import allocator, distributed
from train.process.rank_log import on_terminal
from train.process.run_files import RunDir
from train.process.signals import StopRequest

Observer = Callable[[int, dict[str, Any]], None]
"""Called on every rank after each step, with its number and its record."""

_RETURN_MEMORY_EVERY = 10
"""Steps, on CPU."""


@dataclass
class Stage:
    """What one rank holds while a stage runs.

    Attributes:
        config: The run's configuration.
        run_dir: Where checkpoints go.
        engine: The engine.
        loader: Yields the micro-batches of each step for this rank.
        identity: What checkpoints belong to.
        total_steps: Steps of the whole stage.
        progress: Where it stands.
        stop: Stop requests.
    """

    config: RunConfig
    run_dir: Path
    engine: Engine
    loader: TrainLoader
    identity: dict[str, str]
    total_steps: int
    progress: Progress
    stop: StopRequest

    def __post_init__(self) -> None:
        keep, background = self.config.checkpoint.keep, self.config.checkpoint.background
        self.saver = Saver(self.engine, self.run_dir, self.identity, keep, background)

    def resume(self) -> Path | None:
        """Take over where the newest checkpoint stands, and return it; None where there is none. Collective."""
        found = checkpoint.find(self.run_dir)
        if found is not None:
            self.progress = checkpoint.load(self.engine, found, self.identity)
            self.loader.load(self.progress.loader)
        return found

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint; `wait`: until it is there, in the background or not. Collective."""
        self.progress.loader = self.loader.state()
        self.saver.save(self.progress)
        if wait:
            self.saver.finish()

    def take_best(self) -> None:
        """Put the weights of the lowest validation loss into the engine, to be exported. Collective.

        Raises:
            CheckpointError: that checkpoint is damaged or gone.
        """
        step = self.progress.best_step
        if step in (0, self.progress.step):
            return
        path = RunDir(self.run_dir).checkpoints / checkpoint.name(step)
        if problem := checkpoint.damaged(path):
            raise CheckpointError(f"{path}: {problem}; checkpoint.export=last takes the newest weights instead")
        checkpoint.load(self.engine, path, self.identity)


class Loop:
    """Trains until the last step or a stop request.

    Args:
        stage: What it works on; its `progress` is counted here.
        recorder: Makes each step's record.
        observers: What looks at the records, in this order.
        validation: Looks at the model now and then; null: nobody does.
    """

    def __init__(
        self,
        stage: Stage,
        recorder: Recorder,
        observers: Sequence[Observer] = (),
        validation: Validation | None = None,
    ) -> None:
        self.stage, self.recorder, self.observers, self.validation = stage, recorder, observers, validation
        self.timer = StepTimer(stage.engine.model)
        self._began = False
        self._named: set[str] = set()

    def run(self) -> bool:
        """Train; True when the stage is finished, False when it stopped on request with a checkpoint written."""
        stage, progress = self.stage, self.stage.progress
        every = stage.config.checkpoint.every
        self._validate_if_due()  # resumed: a stop may have come between a step and its validation
        while progress.step < stage.total_steps:
            self.step()
            stage.saver.poll()
            if progress.step == stage.total_steps:
                break
            # After a step, not before the first: a run that is stopped during every start must still get on.
            if stage.stop.agreed(stage.engine.device):
                stage.save(wait=True)
                return False
            if self._validate_if_due() or (every and progress.step % every == 0):
                stage.save()
        stage.save(wait=True)
        if self.validation is not None:
            self.validation.run(progress)
        return True

    def _validate_if_due(self) -> bool:
        """Whether the model was looked at now and is better than ever: it is kept then. Collective."""
        progress, every = self.stage.progress, self.stage.config.evaluation.every
        due = every is not None and 0 < progress.step < self.stage.total_steps and progress.step % every == 0
        return due and self.validation is not None and self.validation.run(progress)

    def step(self) -> dict[str, Any]:
        """One optimizer step over all its micro-batches; returns its record (the same on all ranks)."""
        with traced(self.stage.config, self.stage.run_dir, self.stage.progress.step + 1):
            trained = self._train()
        progress, counts = self.stage.progress, trained.counts
        progress.step += 1
        progress.samples += self.stage.config.data.batch_size
        progress.tokens += counts.tokens
        progress.targets += counts.targets
        progress.dropped += counts.dropped
        progress.seconds += trained.seconds
        progress.skipped += not trained.result.applied
        record = self.recorder.record(trained, progress, self.stage.engine.device)
        for observe in self.observers:
            observe(progress.step, record)
        return record

    def _train(self) -> Trained:
        started = time.perf_counter()
        engine, device, step = self.stage.engine, self.stage.engine.device, self.stage.progress.step + 1
        loader = self.stage.loader
        with self.timer.phase("data"):
            dropped_before, known = loader.dropped, len(loader.corrupt)
            batches = next(loader)
        # One message per step crosses the ranks before the first backward: how many targets the mean is over.
        met = list(loader.corrupt.values())[known:]
        counts = Counts.of(batches, loader.dropped - dropped_before, len(met), device)
        if counts.corrupt:
            self._name(met)
        if counts.targets == 0:
            raise UserError(f"step {step} has no target token on any rank; look at data.on_too_long")
        rates = engine.learning_rates()
        # What a step draws (dropout) follows from its number and rank, so that a resumed run draws the same.
        drawn = np.random.SeedSequence((self.stage.config.seed, step, distributed.rank())).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        loss = positions = computed = 0.0
        weights: PerceptualWeights | None = None
        for number, batch in enumerate(batches, 1):
            engine.begin_micro_step(last=number == len(batches))
            with self.timer.phase("forward"):
                output = engine.forward(batch.to(device))
            with self.timer.phase("backward"):
                engine.backward(output.loss_sum, counts.targets)
            loss += output.loss_sum.item()
            weights = output.weights
            positions, computed = positions + output.positions, computed + output.tokens.item()
            with self.timer.phase("optimizer"):
                engine.micro_step()
        result = engine.result()
        # A NaN on one rank must show, not the finite loss of rank 0.
        loss, positions, computed = distributed.reduce([loss, positions, computed], device)
        loss /= counts.targets
        if not (self._began or math.isfinite(loss)):
            cause = finite.explain(engine, batches, loader.samples(step - 1))
            raise UserError(f"the first loss, of step {step}, is {loss}: {cause}")
        self._began = True
        seconds = time.perf_counter() - started
        padding = 1 - computed / positions
        return Trained(counts, loss, padding, result, rates, seconds, batches[-1], self.timer.take(), weights)

    def _name(self, met: list[CorruptShardError]) -> None:
        """Say once, from rank 0, which shards any rank has to leave out. Collective."""
        lines = [f"{each}; its {each.samples} samples are left out of the run" for each in met]
        new = {line for rank in distributed.gather(lines) for line in rank} - self._named
        for line in sorted(new) if distributed.rank() == 0 else ():
            tqdm.write(f"warning: {line}", file=sys.stderr)
        self._named |= new


@contextmanager
def progress_bar(stage: Stage) -> Iterator[Observer]:
    """A bar on rank 0, as an observer."""
    bar = tqdm(
        total=stage.total_steps,
        initial=stage.progress.step,
        desc=f"{stage.config.stage.name} {stage.config.connector.name}",
        unit="step",
        disable=distributed.rank() != 0,
        dynamic_ncols=True,
        mininterval=0 if on_terminal() else 10,
    )

    def show(step: int, record: dict[str, Any]) -> None:
        bar.set_postfix(
            loss=f"{record['loss']:.3f}",
            samples_s=f"{record['samples_per_s']:.1f}",
            tokens_s=f"{record['tokens_per_s']:.0f}",
            refresh=False,
        )
        bar.update()

    with bar:
        yield show


def return_memory(step: int, record: dict[str, Any]) -> None:
    """Observer on CPU ranks: hand freed memory back now and then."""
    if step % _RETURN_MEMORY_EVERY == 0:
        allocator.return_freed_memory()
