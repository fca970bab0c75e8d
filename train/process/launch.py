"""Starts the workers of a run on this machine and waits for them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from common.errors import UserError, report_errors
from common.files import write_atomically
from train import worker
from train.config import RunConfig
from train.process.rank_log import RankLog
from train.process.run_files import RunDir
from train.process.signals import die_with

# To each worker. A closed terminal is a stop request like any other.
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


def start_method() -> str:
    """How to start a process that trains: `fork`, after the imports of a stage, which are ten seconds of every start.

    `spawn` where there is a GPU: asking for it touches the driver, which a fork could not use after that.
    """
    if torch.cuda.is_available():
        return "spawn"
    import train.engine.stage  # noqa: F401

    return "fork"


def run(config: RunConfig, run_dir: Path) -> bool:
    """Run the stage with `launch.workers` processes and wait for it.

    Returns:
        Whether the stage is finished; False after a clean stop on request.

    Raises:
        UserError: a worker failed; carries its message.
    """
    workers = worker_count(config)
    threads = config.launch.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    for marker in (RunDir(run_dir).stop, RunDir(run_dir).stopped):
        marker.unlink(missing_ok=True)
    # Held here, so that its port is taken when the workers learn of it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    errors = run_dir / ".errors"  # here, where it is found and removed after a front end that was killed
    shutil.rmtree(errors, ignore_errors=True)
    errors.mkdir()
    try:
        environment = {
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's way to say that no rank need open the store
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            _run_workers(workers, run_dir, environment, str(errors))
        except mp.ProcessExitedException as error:
            # A rank that only lost the one with something to say may have ended before it.
            for file in sorted(errors.glob("*.json")):
                with suppress(ValueError, KeyError):  # cut, where the rank was killed while it wrote
                    raise UserError(_said(file)) from error
            end = (
                f"ended with {error.signal_name or f'exit code {error.exit_code}'}; its output stands above "
                f"and in {RunDir(run_dir).logs}/rank-{error.error_index}.log"
            )
            if (raised := errors / f"{error.error_index}.txt").exists():
                print(raised.read_text(encoding="utf-8"), file=sys.stderr)
                end = "raised the error above"
            raise UserError(f"the run in {run_dir} failed: rank {error.error_index} {end}") from error
    finally:
        shutil.rmtree(errors, ignore_errors=True)
    return RunDir(run_dir).done.exists()


def _worker(rank: int, run_dir: Path, environment: dict[str, str], errors: str) -> None:
    front_end = mp.parent_process()
    assert front_end is not None and front_end.pid is not None
    die_with(front_end.pid)
    said = Path(errors) / f"{rank}.json"
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(said)}
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    log = RankLog(run_dir, rank)
    try:
        code = report_errors(lambda: worker.run(run_dir))
        if said.exists():
            log.note(f"error: {_said(said)}")
    except Exception:  # kept here: torch would leave a file in the temporary folder for each rank
        text = traceback.format_exc()
        said.with_suffix(".txt").write_text(text, encoding="utf-8")
        log.note(text)
        code = 1
    log.close()
    if code:
        sys.exit(code)


def _said(file: Path) -> str:
    """The line in which a rank reported its error."""
    return str(json.loads(file.read_text(encoding="utf-8"))["user_error"])


def _run_workers(workers: int, run_dir: Path, environment: dict[str, str], errors: str) -> None:
    """Start the workers and wait for them. Told to stop, this process tells them, and they end with their step."""
    method = start_method()
    pids: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        # For a worker that is not ready to take the signal: it ignores what this process ignored when it was started.
        write_atomically(RunDir(run_dir).stop, signal.Signals(number).name)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, _PASSED_ON[signal.Signals(number)])

    before = {number: signal.signal(number, signal.SIG_IGN) for number in _PASSED_ON}
    try:
        gc.freeze()  # a rank's collections need not look at what is imported, and so copy it: a second of each start
        started = mp.start_processes(_worker, (run_dir, environment, errors), workers, join=False, start_method=method)
        gc.unfreeze()
        pids += started.pids()
        for number in _PASSED_ON:
            signal.signal(number, pass_on)
        # After a failure the others have this long to end by themselves, and again after a SIGTERM.
        while not started.join(grace_period=10):
            pass
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
