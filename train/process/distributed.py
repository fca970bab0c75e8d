"""Process group set-up and the few collectives that the loop itself needs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from train.process import allocator, watchdog

# torchrun's names and SLURM's for the same things; torchrun's win, so one program serves both.
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def map_slurm_environment() -> None:
    """Fill in RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables where torchrun did not set them."""
    for name, slurm in _SLURM.items():
        if name not in os.environ and slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    if "LOCAL_WORLD_SIZE" not in os.environ and "SLURM_NTASKS_PER_NODE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_NTASKS_PER_NODE"]


def init(timeout_minutes: float) -> torch.device:
    """Join the process group (nccl on GPUs, gloo without) and return this rank's device.

    Raises:
        UserError: the rank variables are missing, or the local rank has no GPU.
    """
    map_slurm_environment()
    missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"environment variables {', '.join(missing)} are not set; start workers through `python -m train`, "
            "torchrun or srun"
        )
    quiet()
    use_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on this node; "
                "ask for one GPU per task and let every task see all of them"
            )
        torch.cuda.set_device(local_rank)
    import deepspeed

    if not use_gpu:
        allocator.keep_freed_memory()
        # init_distributed would compile a shared-memory collective for a minute (and needs a compiler); it is used
        # for inference only.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes), verbose=False
    )
    return torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")


def quiet() -> None:
    """Keep third-party chatter out of the log; errors still show."""
    import logging

    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", message=".*barrier.*device.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Ranks on this machine; 1 where the launcher does not tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def reduce(values: Sequence[float], device: torch.device, op: str = "sum") -> list[float]:
    """All-reduce a few numbers in fp64; `op` is sum, max or min."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
    reduced: list[float] = tensor.tolist()
    watchdog.beat()
    return reduced


def gather(value: Any) -> list[Any]:
    """A small picklable value of every rank, in the order of ranks, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
