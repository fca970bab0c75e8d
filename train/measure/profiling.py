"""What a step did, operation by operation, and what filled a GPU's memory: files in RUN_DIR/profile for other tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.errors import UserError
from train.config import RunConfig
from train.process import distributed
from train.process.run_files import RunDir


@contextmanager
def traced(config: RunConfig, run_dir: Path, step: int) -> Iterator[None]:
    """Trace a step with torch.profiler where `debug.profile` names it, else do nothing.

    Writes `step-N-rank-R.json.gz` of every rank, for Perfetto, chrome://tracing or TensorBoard.
    """
    if step not in config.debug.profile:
        yield
        return
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
        yield
    folder = RunDir(run_dir).profile
    folder.mkdir(exist_ok=True)
    profile.export_chrome_trace(str(folder / f"step-{step:06d}-rank-{distributed.rank()}.json.gz"))


@contextmanager
def memory_explained(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Inside, a GPU out of memory ends the run in one line that says what to lower, and leaves a snapshot.

    Raises:
        UserError: in place of torch's error.
    """
    if torch.cuda.is_available() and config.debug.memory_history:
        torch.cuda.memory._record_memory_history(max_entries=config.debug.memory_history)
    try:
        yield
    except torch.OutOfMemoryError as error:
        rank = distributed.rank()
        file = RunDir(run_dir).profile / f"memory-rank-{rank}.pickle"
        said = ""
        with suppress(Exception):  # whatever the state of the GPU: the line is said
            file.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
            said = f". What filled it: {file} (a pickle of this run, for the viewer at pytorch.org/memory_viz)"
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"rank {rank} is out of GPU memory; {what_to_lower(config)}{said}. torch says: {first}"
        ) from error


def what_to_lower(config: RunConfig) -> str:
    """The settings that save memory and are not used yet, those that cost least first."""
    engine, stage = config.engine, config.stage
    ways = []
    if engine.zero_stage < 3:
        ways.append("engine.zero_stage=3 (weights shared among the ranks)")
    if engine.gradient_checkpointing is not True:
        ways.append("engine.gradient_checkpointing=true (activations computed twice)")
    if engine.micro_batch_size != 1:
        now = "the rank's whole share" if engine.micro_batch_size is None else f"now {engine.micro_batch_size}"
        ways.append(f"a smaller engine.micro_batch_size ({now}) or data.max_length (now {config.data.max_length})")
    if not engine.offload_optimizer:
        ways.append("engine.offload_optimizer=true optim.name=deepspeed_cpu_adam (optimizer state in host memory)")
    if stage.train.llm:
        ways.append("more ranks")
    return f"try, in this order: {'; '.join(ways)}" if ways else "take more ranks or GPUs with more memory"
