"""Part c: whole training steps of the paper's model through the real engine, ZeRO-3 on one device, random weights.

One form per process, so that each begins with the whole memory. Forms: `vlora` (ours), `released` (the same model with
the low-rank terms as the released code writes them: the generator's output indexed per layer, two einsums and an
addition; indexed per type here, while the released code indexes one tensor of all types, which costs more), `mlp` (576
visual tokens in the LLM's input), `finetune` (an LLM of fewer layers, trained), `zero2` and `compiled` (ZeRO-2 without
and with torch.compile, which needs whole parameters). `released` runs under ZeRO-2 and is compared with `zero2`.
"""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu import models
from benchmarks.gpu.part import Context
from benchmarks.gpu.timing import once
from model.batch import Batch
from train.config import RunConfig
from train.engine.engine import Engine, freeze
from train.measure import memory
from train.measure.flops import FlopCounter, peak_flops
from train.process import distributed

FORMS: dict[str, tuple[str, ...]] = {
    "vlora": (),
    "mlp": ("connector=mlp",),
    "released": ("engine.zero_stage=2", "llm.pack_tokens=null"),
    "finetune": ("stage=finetune", "init_from=none"),
    "zero2": ("engine.zero_stage=2", "engine.compile=null"),
    "compiled": ("engine.zero_stage=2", "engine.compile=inductor"),
}


def step(context: Context, form: str) -> None:
    """Samples/s, MFU, peak memory against the plan, and where the time goes, of one form."""
    size, finetuned = context.size, form == "finetune"
    samples, length = size.finetuning if finetuned else size.pretraining
    overrides = [*FORMS[form], f"data.batch_size={samples}"]
    config = models.configuration(context.tiny, *overrides)
    if context.tiny and config.engine.compile:
        config.engine.compile = "aot_eager"  # inductor would compile for a minute
    if finetuned:
        config = models.cut(config, size.finetuned_layers)
    device = _join(config)
    config = _settle(config, samples, length, device)
    plan = memory.plan(config, 1, _load(config, samples, length)).total(config.engine.gradient_checkpointing)
    with _released_form() if form == "released" else nullcontext():
        model = models.build(config, device)
        freeze(model, config.stage)
        engine = Engine(model, config, total_steps=100, accumulation=1)
        batch = models.batch(config, samples, length, device)
        flops = FlopCounter(engine.model, False).step(samples, samples * length, batch.n_targets, samples).total
        steps = 2 if context.tiny else 4
        _steps(engine, batch, 2)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [once(lambda: _steps(engine, batch, 1), device) for _ in range(steps)]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        phases = _phases(engine, batch, steps)
    seconds = 1e-3 * median(taken)
    limit = peak_flops(device)
    row: dict[str, Any] = {
        "samples": samples,
        "length": length,
        "ms": 1e3 * seconds,
        "ms_min": min(taken),
        "ms_max": max(taken),
        "samples_per_s": samples / seconds,
        "TFLOP": flops / 1e12,
        "TFLOP_per_s": flops / seconds / 1e12,
        "MFU": flops / seconds / limit if limit else None,
        "checkpointing": config.engine.gradient_checkpointing,
        "planned_GiB": plan / 2**30,
        "peak_GiB": peak / 2**30 if peak else None,
        "plan_over_peak": plan / peak if peak else None,
    }
    context.row("step", row)
    context.row("milliseconds by phase", phases)
    distributed.shutdown()


def saving(context: Context) -> None:
    """How much of the FLOPs that VLoRA saves against 576 visual tokens became time (the paper: 10.7x became 2.3x)."""
    found = context.results.read()["parts"]
    steps = {form: found.get(f"step-{form}", {}).get("rows", {}).get("step") for form in FORMS}
    for slow, fast in (("mlp", "vlora"), ("released", "zero2"), ("zero2", "compiled")):
        if (a := steps[slow]) and (b := steps[fast]):
            context.row(f"{slow} over {fast}", {"FLOPs": a["TFLOP"] / b["TFLOP"], "time": a["ms"] / b["ms"]})


def _join(config: RunConfig) -> torch.device:
    """A process group of this process alone: NCCL on a GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    return distributed.init(timeout_minutes=config.engine.timeout_minutes)


def _settle(config: RunConfig, samples: int, length: int, device: torch.device) -> RunConfig:
    """Gradient checkpointing where the plan says that the step does not fit without."""
    if config.engine.gradient_checkpointing == "auto":
        limit = memory.available(config, device)
        plan = memory.plan(config, 1, _load(config, samples, length))
        config.engine.gradient_checkpointing = plan.needs_checkpointing(limit or 0)
    return config


def _load(config: RunConfig, samples: int, length: int) -> memory.Workload:
    return memory.Workload(samples, samples, samples, length, length, measured=True)


def _steps(engine: Engine, batch: Batch, count: int) -> None:
    for _ in range(count):
        output = engine.forward(batch)
        engine.backward(output.loss_sum, batch.n_targets)
        engine.micro_step()
        if not engine.result().applied:
            raise RuntimeError("a step had a non-finite gradient")


def _phases(engine: Engine, batch: Batch, steps: int) -> dict[str, float]:
    """Milliseconds of each phase, mean over steps; CUDA events on a GPU, so nothing waits for the host."""
    device = engine.device
    marks: list[tuple[str, Any, Any]] = []

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(module: nn.Module | None, name: str) -> list[Any]:
        if module is None:
            return []
        starts: list[Any] = []
        before = module.register_forward_pre_hook(lambda *_: starts.append(mark()))
        after = module.register_forward_hook(lambda *_: marks.append((name, starts.pop(), mark())))
        return [before, after]

    def phase(name: str, run: Callable[[], Any]) -> Any:
        start = mark()
        result = run()
        marks.append((name, start, mark()))
        return result

    hooks = watch(engine.model.vision, "vision") + watch(engine.model.connector, "connector")
    for _ in range(steps):
        output = phase("forward", lambda: engine.forward(batch))
        phase("backward", partial(engine.backward, output.loss_sum, batch.n_targets))
        phase("optimizer", engine.micro_step)
        engine.result()
    for hook in hooks:
        hook.remove()
    if device.type == "cuda":
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for name, start, end in marks:
        total[name] += (start.elapsed_time(end) if device.type == "cuda" else 1e3 * (end - start)) / steps
    total["llm"] = total.pop("forward") - total["vision"] - total["connector"]
    return dict(total)  # no data: the batch lies on the device, and benchmarks/loader.py measures the loader


@contextmanager
def _released_form() -> Iterator[None]:
    """Inside the block the low-rank terms are what the released VLoRA code computes."""

    def term(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return scale * torch.einsum("blr,rd->bld", torch.einsum("bld,bdr->blr", x, a), b)

    def group(x: Tensor, weights: Any, a: Any, b: Any, scale: float, *, biases: Any = (), rows: Any = None) -> tuple:
        return tuple(one(x, w, a_g, b_g, scale) for w, a_g, b_g in zip(weights, a, b, strict=True))

    def one(
        x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, *, bias: Any = None, rows: Any = None
    ) -> Tensor:
        return nn.functional.linear(x, weight, bias) + term(x, a, b, scale)

    def delta(x: Tensor, a: Tensor, b: Tensor, scale: float, *, rows: Any = None) -> Tensor:
        return term(x, a, b, scale)

    with (
        mock.patch("model.generator.generator.split_perceptual", lambda out: [out[:, i] for i in range(out.shape[1])]),
        mock.patch("model.decoder.injection.lowrank_linear_group", group),
        mock.patch("model.decoder.injection.lowrank_linear", one),
        mock.patch("model.decoder.injection.lowrank_delta", delta),
    ):
        yield
