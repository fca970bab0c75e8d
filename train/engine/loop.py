"""The training loop: steps, records, checkpoints, stop requests."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from common.errors import UserError
from model.generator.placement import Site
from model.generator.weights import PerceptualWeights
from train.config import RunConfig
from train.data import EvalLoader, TrainLoader
from train.engine import checkpoint, finite
from train.engine.checkpoint import Progress
from train.engine.engine import Engine
from train.measure.flops import FlopCounter, peak_flops
from train.measure.timing import StepTimer
from train.measure.tracking import Tracker
from train.process import allocator, distributed
from train.process.signals import StopRequest

_RETURN_MEMORY_EVERY = 10
"""Steps, on CPU."""


class Loop:
    """Trains until the last step or a stop request.

    Args:
        engine: The engine.
        loader: Yields the micro-batches of each step for this rank.
        config: The run's configuration.
        run_dir: Where checkpoints go.
        identity: What checkpoints belong to.
        progress: Where to go on from.
        total_steps: Steps of the whole stage.
        stop: Stop requests.
        tracker: On rank 0; None elsewhere.
        flops: Counts the model's FLOPs.
        base_norms: |W| per site, for |dW| / |W|.
        on_samples: Called at `tracking.samples_every` with the step; collective.
    """

    def __init__(
        self,
        engine: Engine,
        loader: TrainLoader,
        config: RunConfig,
        run_dir: Path,
        identity: dict[str, str],
        progress: Progress,
        total_steps: int,
        stop: StopRequest,
        tracker: Tracker | None,
        flops: FlopCounter,
        base_norms: dict[Site, float],
        on_samples: Callable[[int], None] | None = None,
    ) -> None:
        self.engine, self.loader, self.config, self.run_dir = engine, loader, config, run_dir
        self.identity, self.progress, self.total_steps = identity, progress, total_steps
        self.stop, self.tracker, self.flops, self.base_norms = stop, tracker, flops, base_norms
        self.on_samples = on_samples
        self.timer = StepTimer(engine.model)
        self._began = False

    def run(self) -> bool:
        """Train; True when the stage is finished, False when it stopped on request with a checkpoint written."""
        bar = tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc=f"{self.config.stage.name} {self.config.connector.name}",
            unit="step",
            disable=self.tracker is None,
            dynamic_ncols=True,
            mininterval=0 if sys.stderr.isatty() else 10,
        )
        with bar:
            while self.progress.step < self.total_steps:
                record = self.step()
                bar.set_postfix(
                    loss=f"{record['loss']:.3f}",
                    samples_s=f"{record['samples_per_s']:.1f}",
                    tokens_s=f"{record['tokens_per_s']:.0f}",
                    refresh=False,
                )
                bar.update()
                if self.engine.device.type == "cpu" and self.progress.step % _RETURN_MEMORY_EVERY == 0:
                    allocator.return_freed_memory()
                if self.progress.step == self.total_steps:
                    break
                # After a step, not before the first: a run that is stopped during every start must still get on.
                if self.stop.agreed(self.engine.device):
                    self.save()
                    return False
                every = self.config.checkpoint.every
                if every and self.progress.step % every == 0:
                    self.save()
        self.save()
        return True

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        self.progress.loader = self.loader.state()
        checkpoint.save(self.engine, self.run_dir, self.progress, self.identity, self.config.checkpoint.keep)

    def step(self) -> dict[str, Any]:
        """One optimizer step over all its micro-batches; returns its record (the same on all ranks)."""
        started = time.perf_counter()
        engine, device = self.engine, self.engine.device
        with self.timer.phase("data"):
            batches = next(self.loader)
        # One number per step crosses the ranks before the first backward: how many targets the mean is over.
        counts = [
            sum(b.n_targets for b in batches),
            sum(int(b.attention_mask.sum()) for b in batches),
            sum(b.attention_mask.numel() for b in batches),
            sum(len(b.input_ids) for b in batches),
            sum(int(b.image_weight.sum()) for b in batches),
        ]
        targets, tokens, padded, rows, images = (int(n) for n in distributed.reduce(counts, device))
        if targets == 0:
            raise UserError(f"step {self.progress.step + 1} has no target token on any rank; look at data.on_too_long")
        lr = engine.learning_rates()
        loss_sum = positions = computed = 0.0
        weights: PerceptualWeights | None = None
        for number, batch in enumerate(batches, 1):
            engine.begin_micro_step(last=number == len(batches))
            with self.timer.phase("forward"):
                output = engine.forward(batch.to(device))
            with self.timer.phase("backward"):
                engine.backward(output.loss_sum, targets)
            loss_sum += output.loss_sum.item()
            weights = output.weights
            positions, computed = positions + output.positions, computed + output.tokens.item()
            with self.timer.phase("optimizer"):
                engine.micro_step()
        result = engine.result()
        # A NaN on one rank must show, not the finite loss of rank 0.
        loss, positions, computed = distributed.reduce([loss_sum, positions, computed], device)
        loss /= targets
        if not (self._began or math.isfinite(loss)):
            cause = finite.explain(engine, batches, self.loader.samples(self.progress.step))
            raise UserError(f"the first loss, of step {self.progress.step + 1}, is {loss}: {cause}")
        self._began = True
        seconds = time.perf_counter() - started

        progress = self.progress
        progress.step += 1
        progress.samples += self.config.data.batch_size
        progress.tokens += tokens
        progress.targets += targets
        progress.seconds += seconds
        progress.skipped += not result.applied
        record = {
            "loss": loss,
            "grad_norm": result.grad_norm,
            "step_applied": result.applied,
            "skipped_steps": progress.skipped,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "samples_per_s": self.config.data.batch_size / seconds,
            "tokens_per_s": tokens / seconds,
            "seconds": progress.seconds,
            "supervised_fraction": targets / tokens,
            "padding_fraction": 1 - computed / positions,
            "padding_fraction_of_rows": 1 - tokens / padded,  # what it is without llm.pack_tokens
            **{f"lr/{name}": value for name, value in lr.items()},
            **{f"time/{name}": value for name, value in self.timer.take().items()},
        }
        if not result.applied:
            self._warn(f"step {progress.step}: gradient norm {result.grad_norm}, step skipped on all ranks")
        weights_due = progress.step == 1 or progress.step % self.config.tracking.weights_every == 0
        if weights is not None and weights_due:
            # This rank's last micro-batch, samples with an image only: those without have A = 0 by definition.
            seen = batches[-1].image_to_sample[batches[-1].image_weight > 0].unique()
            if len(seen) > 1:
                record |= self._weight_records(weights.select(seen.to(device)))
        log_due = (
            progress.step % self.config.tracking.log_every == 0
            or progress.step in (1, self.total_steps)
            or not result.applied
            or weights_due
        )
        if log_due:
            record |= self._system_records(rows, tokens, targets, images, seconds)
        if self.tracker is not None:
            self.tracker.log(progress.step, record)
        samples_every = self.config.tracking.samples_every
        if self.on_samples is not None and samples_every and progress.step % samples_every == 0:
            self.on_samples(progress.step)
        return record

    @torch.no_grad()
    def validate(self, loader: EvalLoader) -> float:
        """Mean loss per target over a held-out split; also logged. Collective."""
        model, device = self.engine.model, self.engine.device
        model.eval()
        loss = targets = 0.0
        for evaluation in loader:
            output = self.engine.forward(evaluation.batch.to(device))
            loss, targets = loss + output.loss_sum.item(), targets + output.n_targets
        model.train()
        loss, targets = distributed.reduce([loss, targets], device)
        if self.tracker is not None:
            self.tracker.log(self.progress.step, {"val_loss": loss / targets})
        return loss / targets

    def _weight_records(self, weights: PerceptualWeights) -> dict[str, float]:
        """Image share of A and |dW| / |W| per site."""
        share = weights.image_share().item()
        limit = self.config.tracking.min_image_share
        if share < limit:
            self._warn(
                f"step {self.progress.step}: only {share:.4f} of A's energy varies with the image (limit {limit}); the "
                "generator is turning into a plain LoRA. Lower the learning rate, warm up longer, or use "
                "generator.init=stable"
            )
        ratios = {site: norm.item() / self.base_norms[site] for site, norm in weights.norms().items()}
        return {
            "image_share": share,
            "delta_ratio/mean": sum(ratios.values()) / len(ratios),
            **{f"delta_ratio/{site.name}": ratio for site, ratio in ratios.items()},
        }

    def _system_records(self, rows: int, tokens: int, targets: int, images: int, seconds: float) -> dict[str, float]:
        device = self.engine.device
        flops = self.flops.step(rows, tokens, targets, images).total
        world = distributed.world_size()
        rss = psutil.Process().memory_info().rss / 2**30
        host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
        rss, host_peak, peak = distributed.reduce([rss, host_peak, peak], device, "max")
        records = {
            "tflops_per_s_per_rank": flops / seconds / world / 1e12,
            "memory/host_gib": rss,
            "memory/host_peak_gib": host_peak,
        }
        if device.type == "cuda":
            records["memory/device_peak_gib"] = peak
        if (limit := peak_flops(device)) is not None:
            records["mfu"] = flops / seconds / world / limit
        return records

    def _warn(self, message: str) -> None:
        if self.tracker is not None:
            tqdm.write(f"warning: {message}", file=sys.stderr)
