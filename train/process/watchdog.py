"""Notices a run that no longer moves, writes where every rank stands, and ends it so that it is requeued.

A rank that stands still (a stopped process, a dead disk, a deadlock) keeps all others waiting in a collective. Each
rank watches itself: when nothing moved for the configured time it writes its own stacks, has the other ranks of its
host write theirs, says which rank is behind and leaves with an exit code that a cluster counts as a crash.

RUN_DIR/hang/ holds `rank-N.json` while a run lives (host, process, how far it came), and after a hang, by rank and
start, `stacks-rank-N-TIME.txt` (all Python threads) and on GPUs `nccl-rank-N-TIME.bin` (NCCL's flight recorder, a
pickle that torch's `fr_trace` reads).
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.files import write_atomically
from train.process.run_files import RunDir

EXIT_CODE = 1
"""As of any crash: slurm/body.sh requeues it unless the crash before came no earlier."""

_active: Watchdog | None = None


def beat() -> None:
    """This rank moved: a collective ended, a forward pass began. Free where no watchdog runs."""
    if _active is not None:
        _active.count += 1


def record_nccl(run_dir: Path) -> None:
    """Have NCCL remember its last collectives. Before the process group is made; what the user has set stays."""
    import torch

    renamed = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)  # and warns of the old name
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(RunDir(run_dir).hang / "nccl-timeout-rank-"))


class Watchdog:
    """Watches this rank from its first step to the end of the block.

    Only time in which this process ran counts, so that a run suspended as a whole resumes in peace.

    Args:
        run_dir: Where `hang/` is.
        rank: Of this process.
        seconds: Without a beat, after the first one, that make a hang; None: do not watch.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float | None) -> None:
        self.folder, self.rank, self.seconds = RunDir(run_dir).hang, rank, seconds
        self._record = self.folder / f"rank-{rank}.json"
        self.count = 0
        self._started = time.strftime("%Y%m%d-%H%M%S")
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        global _active
        if self.seconds is not None:
            self._stacks = self._open()
            # In C, so that a rank whose threads all hang answers too.
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
            self._say()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        self._done.set()
        if self.seconds is not None:
            self._thread.join(5.0)  # or it would write its record again; not for ever: the disk may be what hangs
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            with suppress(ValueError, OSError):
                if json.loads(self._record.read_text(encoding="utf-8"))["pid"] == os.getpid():  # not of a later start
                    self._record.unlink()
            _remove_empty(Path(self._stacks.name))
            with suppress(OSError):  # others are still there, or a report is
                self.folder.rmdir()

    def _file(self, kind: str, suffix: str) -> Path:
        return self.folder / f"{kind}-rank-{self.rank}-{self._started}.{suffix}"

    def _open(self) -> TextIO:
        """The file for this start's stacks. Ranks of a killed start may still be leaving and remove the folder."""
        while True:
            self.folder.mkdir(exist_ok=True)
            for file in self.folder.glob(f"stacks-rank-{self.rank}-*.txt"):
                _remove_empty(file)  # of a start that was killed
            with suppress(FileNotFoundError):  # one of them has just removed the folder
                return self._file("stacks", "txt").open("w", encoding="utf-8")

    def _say(self) -> None:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "progress": self.count, "time": time.time()}
        write_atomically(self._record, json.dumps(record))

    def _watch(self) -> None:
        assert self.seconds is not None
        tick = min(5.0, self.seconds / 10)
        seen, still, said = 0, 0.0, time.monotonic()
        while not self._done.wait(tick):
            if self.count != seen:
                seen, still = self.count, 0.0
            elif seen:
                still += tick
            if time.monotonic() - said >= self.seconds / 5:
                said = time.monotonic()
                with suppress(OSError):  # a full disk is not a hang
                    self._say()
            if still >= self.seconds:
                self._report(self.seconds)
                os._exit(EXIT_CODE)

    def _report(self, seconds: float) -> None:
        """Stacks of this rank and of those on its host, NCCL's record, and one line that names who is behind."""
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        with suppress(Exception):  # whatever the state of NCCL: the stacks are written
            self._dump_nccl()
        ranks = self._ranks()
        for rank, record in ranks.items():
            if rank != self.rank and record["host"] == socket.gethostname():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(record["pid"], signal.SIGUSR2)  # waits for a stopped process, and comes first when it wakes
                    os.kill(record["pid"], signal.SIGCONT)
        print(
            f"error: rank {self.rank} did not move for {seconds:.0f} s (engine.hang_minutes); "
            f"{_behind(ranks, seconds)}. Stacks of the ranks: {self.folder}/stacks-rank-*.txt",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(1.0)  # all is written: SLURM kills what is left of a step at the end of the first rank

    def _ranks(self) -> dict[int, dict[str, Any]]:
        found = {}
        for file in self.folder.glob("rank-*.json"):
            with suppress(ValueError, OSError):
                found[int(file.stem.removeprefix("rank-"))] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def _dump_nccl(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_backend() == "nccl":
            recorder: Any = importlib.import_module("torch._C._distributed_c10d")
            self._file("nccl", "bin").write_bytes(recorder._dump_nccl_trace())


def _remove_empty(file: Path) -> None:
    with suppress(FileNotFoundError):
        if file.stat().st_size == 0:
            file.unlink()


def _behind(ranks: dict[int, dict[str, Any]], seconds: float) -> str:
    """Who is behind: a rank that stopped reporting, else the one that came less far than the others."""
    now = max((record["time"] for record in ranks.values()), default=0.0)
    ages = {rank: now - record["time"] for rank, record in ranks.items()}
    least = min((record["progress"] for record in ranks.values()), default=0)
    most = max((record["progress"] for record in ranks.values()), default=0)
    oldest = max(ages, key=ages.__getitem__, default=None)
    names = {rank: f"rank {rank} ({record['host']}, process {record['pid']})" for rank, record in ranks.items()}
    # A rank that runs says so five times in the bound, whether it moves or not.
    if oldest is not None and ages[oldest] > seconds / 2:
        return f"{names[oldest]} has not run for {ages[oldest]:.0f} s: it is stopped, dead or cannot write"
    slow = [names[rank] for rank, record in ranks.items() if record["progress"] == least]
    if least < most and slow:
        return f"behind the others is {', '.join(slow)}"
    return "all ranks came equally far"
