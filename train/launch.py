"""Starts the workers of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from train.config import RunConfig
from train.errors import UserError


def local(config: RunConfig, run_dir: Path) -> int:
    """Run the stage with `launch.workers` processes and wait for it.

    Returns:
        Exit code: 0 when the stage finished or stopped cleanly on request.
    """
    workers = worker_count(config)
    threads = config.launch.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Our package is found from any working directory.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", f"--nproc-per-node={workers}", "--max-restarts=0"),
        # Without these torchrun dies of SIGUSR1 and orphans its workers, and kills a worker that saves for over 30 s.
        *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=600"),
        *("-m", "train.worker", str(run_dir)),
    ]
    (run_dir / "STOP").unlink(missing_ok=True)
    (run_dir / "STOPPED").unlink(missing_ok=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, frame: object) -> None:
        process.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if (run_dir / "STOPPED").exists():
        return 0  # torchrun reports 1 after any signal, a clean stop included
    return code


def worker_count(config: RunConfig) -> int:
    """Processes to start.

    Raises:
        UserError: more workers than GPUs.
    """
    gpus = torch.cuda.device_count()
    workers = config.launch.workers or max(1, gpus)
    if gpus and workers > gpus:
        raise UserError(f"launch.workers={workers}, but this machine has {gpus} GPUs; one process per GPU")
    return workers
