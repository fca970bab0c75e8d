"""Starts the workers of a run on this machine and waits for them."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from model.errors import UserError, report_errors
from train import worker
from train.config import RunConfig

# To each worker. A closed terminal is a stop request like any other.
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


def local(config: RunConfig, run_dir: Path) -> bool:
    """Run the stage with `launch.workers` processes and wait for it.

    Without a GPU the workers are forks of this process, which has done the imports: ten seconds of a start.

    Returns:
        Whether the stage is finished; False after a clean stop on request.

    Raises:
        UserError: a worker failed; carries its message.
    """
    workers = worker_count(config)
    threads = config.launch.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    for marker in ("STOP", "STOPPED"):
        (run_dir / marker).unlink(missing_ok=True)
    use_gpu = torch.cuda.is_available()  # asks the driver, after which a fork could not use it
    if not use_gpu:
        import train.stage  # noqa: F401
    # Held here, so that its port is taken when the workers learn of it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as errors:
        environment = {
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's way to say that no rank need open the store
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        arguments = (run_dir, environment, errors)
        started = mp.start_processes(
            _worker, arguments, workers, join=False, start_method="spawn" if use_gpu else "fork"
        )
        try:
            with _signals_passed_on(started.pids()):
                # After a failure the others have this long to end by themselves, and again after a SIGTERM.
                while not started.join(grace_period=10):
                    pass
        except mp.ProcessExitedException as error:
            end = error.signal_name or f"exit code {error.exit_code}"
            said = f"rank {error.error_index} ended with {end}; its output stands above"
            raise UserError(_reason(errors) or f"the run in {run_dir} failed: {said}") from error
        except mp.ProcessRaisedException as error:
            print(error, file=sys.stderr)
            said = f"rank {error.error_index} raised the error above"
            raise UserError(_reason(errors) or f"the run in {run_dir} failed: {said}") from error
    return (run_dir / "DONE").exists()


def _worker(rank: int, run_dir: Path, environment: dict[str, str], errors: str) -> None:
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_ERROR_FILE": str(Path(errors) / str(rank)),
    }
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if code := report_errors(lambda: worker.run(run_dir)):
        sys.exit(code)


def _reason(errors: str) -> str | None:
    """What a rank said to the user; the others may only have lost it, and may have ended before it."""
    texts = [json.loads(file.read_text())["user_error"] for file in sorted(Path(errors).iterdir())]
    return texts[0] if texts else None


@contextmanager
def _signals_passed_on(pids: list[int]) -> Iterator[None]:
    """Inside the block the workers get what this process is told: they stop at the end of their step."""

    def pass_on(number: int, frame: object) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, _PASSED_ON[signal.Signals(number)])

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
