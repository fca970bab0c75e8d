"""What is recorded of a step: loss and counts always, weights and system figures when they are due."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from tqdm import tqdm

from model.batch import Batch
from model.generator.placement import Site
from model.generator.weights import PerceptualWeights
from train.config import RunConfig
from train.engine.checkpoint import Progress
from train.engine.engine import StepResult
from train.measure.flops import FlopCounter, peak_flops
from train.measure.stragglers import Stragglers
from train.process import distributed


@dataclass(frozen=True)
class Counts:
    """Of one step, over all ranks.

    Attributes:
        targets: Supervised tokens.
        tokens: Text tokens.
        padded: Positions of the text rows, padding included.
        rows: Text rows.
        images: Images, dummies not counted.
        dropped: Dialogues left out as too long.
        corrupt: Shards that ranks met as unreadable for the first time; one that two of them met counts twice.
    """

    targets: int
    tokens: int
    padded: int
    rows: int
    images: int
    dropped: int
    corrupt: int

    @classmethod
    def of(cls, batches: list[Batch], dropped: int, corrupt: int, device: torch.device) -> Counts:
        """Count this step's micro-batches. Collective: one message for all seven."""
        own = [
            sum(b.n_targets for b in batches),
            sum(int(b.attention_mask.sum()) for b in batches),
            sum(b.attention_mask.numel() for b in batches),
            sum(len(b.input_ids) for b in batches),
            sum(int(b.image_weight.sum()) for b in batches),
            dropped,
            corrupt,
        ]
        return cls(*(int(n) for n in distributed.reduce(own, device)))


@dataclass
class Trained:
    """What one optimizer step did; but for `weights` and `last` the same on all ranks.

    Attributes:
        counts: See there.
        loss: Mean over the targets, nats.
        padding: Share of the decoder's positions that was padding.
        result: Of the optimizer.
        rates: Learning rate per parameter group.
        seconds: Duration.
        phases: Seconds of its phases on this rank.
        weights: The perceptual weights of this rank's last micro-batch, if there are any.
        last: That micro-batch.
    """

    counts: Counts
    loss: float
    padding: float
    result: StepResult
    rates: dict[str, float]
    seconds: float
    last: Batch
    phases: dict[str, float] = field(default_factory=dict)
    weights: PerceptualWeights | None = None


class Recorder:
    """Turns steps into records.

    Args:
        config: The run's configuration.
        total_steps: Steps of the whole stage.
        flops: Counts the model's FLOPs.
        base_norms: |W| per site, for |dW| / |W|.
        stragglers: Compares the ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        total_steps: int,
        flops: FlopCounter,
        base_norms: dict[Site, float],
        stragglers: Stragglers,
    ) -> None:
        self.tracking, self.batch_size, self.total_steps = config.tracking, config.data.batch_size, total_steps
        self.flops, self.base_norms, self.stragglers = flops, base_norms, stragglers
        self.max_length, self._told = config.data.max_length, False

    def record(self, trained: Trained, progress: Progress, device: torch.device) -> dict[str, Any]:
        """The record of the step that `progress` has just counted; the same on all ranks. Collective."""
        counts, seconds, step = trained.counts, trained.seconds, progress.step
        record = {
            "loss": trained.loss,
            "grad_norm": trained.result.grad_norm,
            "step_applied": trained.result.applied,
            "skipped_steps": progress.skipped,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "samples_per_s": self.batch_size / seconds,
            "tokens_per_s": counts.tokens / seconds,
            "seconds": progress.seconds,
            "unix_time": time.time(),  # what lies between two steps counts here, and not in `seconds`
            "dropped_dialogues": progress.dropped,
            "supervised_fraction": counts.targets / counts.tokens,
            "padding_fraction": trained.padding,
            "padding_fraction_of_rows": 1 - counts.tokens / counts.padded,  # what it is without llm.pack_tokens
            **{f"lr/{name}": value for name, value in trained.rates.items()},
            **{f"time/{name}": value for name, value in trained.phases.items()},
        }
        if counts.dropped and not self._told:
            warn(
                f"dialogues longer than data.max_length={self.max_length} are left out; `dropped_dialogues` counts them"
            )
            self._told = True
        if not trained.result.applied:
            warn(f"step {step}: gradient norm {trained.result.grad_norm}, step skipped on all ranks")
        weights_due = step == 1 or step % self.tracking.weights_every == 0
        if trained.weights is not None and weights_due:
            # Samples with an image only: those without have A = 0 by definition.
            seen = trained.last.image_to_sample[trained.last.image_weight > 0].unique()
            if len(seen) > 1:
                record |= self._weights(trained.weights.select(seen.to(device)), step)
        self.stragglers.step(trained.phases.get("data", 0.0), seconds)
        log_due = step % self.tracking.log_every == 0 or step in (1, self.total_steps)
        if log_due or weights_due or not trained.result.applied:
            record |= self._system(counts, seconds, device)
            figures, told = self.stragglers.compare()
            record |= figures
            for message in told:
                warn(f"step {step}: {message}")
        return record

    def _weights(self, weights: PerceptualWeights, step: int) -> dict[str, float]:
        """Image share of A and |dW| / |W| per site."""
        share = weights.image_share().item()
        limit = self.tracking.min_image_share
        if share < limit:
            warn(
                f"step {step}: only {share:.4f} of A's energy varies with the image (limit {limit}); the generator is "
                "turning into a plain LoRA. Lower the learning rate, warm up longer, or use generator.init=stable"
            )
        ratios = {site: norm.item() / self.base_norms[site] for site, norm in weights.norms().items()}
        return {
            "image_share": share,
            "delta_ratio/mean": sum(ratios.values()) / len(ratios),
            **{f"delta_ratio/{site.name}": ratio for site, ratio in ratios.items()},
        }

    def _system(self, counts: Counts, seconds: float, device: torch.device) -> dict[str, float]:
        flops = self.flops.step(counts.rows, counts.tokens, counts.targets, counts.images).total
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


def warn(message: str) -> None:
    """Say something to the user, once: from rank 0."""
    if distributed.rank() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)
