"""Starts the workers of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from model.errors import UserError
from train.config import RunConfig

_CODE = Path(__file__).resolve().parents[1]

CPU_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
"""glibc hands large tensors back to the kernel when they are freed and faults every page in again at the next step;
keeping them is worth 20 % of a step."""


def local(config: RunConfig, run_dir: Path) -> bool:
    """Run the stage with `launch.workers` processes and wait for it.

    Returns:
        Whether the stage is finished; False after a clean stop on request.

    Raises:
        UserError: a worker failed; carries its message.
    """
    workers = worker_count(config)
    threads = config.launch.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Our packages are found from any working directory.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_CODE), os.environ.get("PYTHONPATH")])),
    }
    if not torch.cuda.is_available():
        os.environ |= CPU_ALLOCATOR
    for marker in ("STOP", "STOPPED"):
        (run_dir / marker).unlink(missing_ok=True)
    elastic = ElasticConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=run_dir.name,
        max_restarts=0,
        # Without these two the agent dies of SIGUSR1 and orphans its workers, and kills one that saves for over 30 s.
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        shutdown_timeout=600,
    )
    try:
        elastic_launch(elastic, sys.executable)("-m", "train.worker", str(run_dir))
    except SignalException as error:  # raised after any signal, a clean stop included
        if not (run_dir / "STOPPED").exists():
            raise UserError(f"{run_dir} was stopped by {error.sigval.name} without a new checkpoint") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        known = failure.error_file_data.get("user_error") if isinstance(failure.error_file_data, dict) else None
        detail = known or f"rank {rank} ended with exit code {failure.exitcode}; its output stands above"
        raise UserError(detail if known else f"the run in {run_dir} failed: {detail}") from error
    return (run_dir / "DONE").exists()


def worker_count(config: RunConfig) -> int:
    """Processes to start.

    Raises:
        UserError: more workers than GPUs.
    """
    gpus = torch.cuda.device_count()
    workers = config.launch.workers or max(1, gpus)
    if config.launch.mode == "local" and gpus and workers > gpus:
        raise UserError(f"launch.workers={workers}, but this machine has {gpus} GPUs; one process per GPU")
    return workers
