"""`python -m train.worker RUN_DIR`: one rank of a run.

Started by `train.process.launch` (on one machine), torchrun or srun (on a cluster), the same for a first start, a
restart and a requeue: it resumes from the newest complete checkpoint in RUN_DIR. A finished run is left as it is.
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path

from common.files import write_atomically
from train.process.rank_log import RankLog
from train.process.run_files import RunDir
from train.process.signals import StopRequest


def run(path: Path) -> int:
    """Run one stage to its end or to a stop request; 0 in both cases (`DONE` or `STOPPED` in `path` tells which)."""
    # A cluster kills what still runs at the end of its grace time; slurm/site.sh says how long that is.
    stop = StopRequest(path, float(os.environ.get("VLORA_GRACE_SECONDS", "600")))
    stop.install()  # before the imports below, which take seconds

    from train.config import load
    from train.data import loader_errors
    from train.engine.stage import run_stage
    from train.measure.profiling import memory_explained
    from train.process import distributed, watchdog

    files = RunDir(path)
    config = load(files.config)
    minutes = config.engine.hang_minutes
    watchdog.record_nccl(path)
    device = distributed.init(config.engine.timeout_minutes)
    try:
        guard = watchdog.Watchdog(path, distributed.rank(), minutes and 60 * minutes)
        with loader_errors(), guard, memory_explained(config, path):
            finished = run_stage(config, path, device, stop)
        if distributed.rank() == 0:
            write_atomically(files.done if finished else files.stopped, f"{stop.reason or 'finished'}\n")
        distributed.barrier()
    finally:
        distributed.shutdown()
    stop.done()
    return 0


def main() -> int:
    """Parse the command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return 0
    if len(sys.argv) != 2:
        print("usage: python -m train.worker RUN_DIR", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    # torchrun's name and SLURM's. Closed after an error or a traceback has been printed.
    log = RankLog(path, int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    atexit.register(log.close)
    return run(path)


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
