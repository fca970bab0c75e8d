"""`RUN_DIR/logs/rank-N.log`: what a rank printed, in all its lifetimes, whoever started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from train.process.run_files import RunDir

_TEE = Path(__file__).with_name("tee.py")

_terminal = False


def on_terminal() -> bool:
    """Whether what this process prints on stderr is seen on a terminal, through a `RankLog` or not."""
    return _terminal or sys.stderr.isatty()


class RankLog:
    """From here to `close` whatever this process, its children and its libraries print goes into the log as well.

    By file descriptor, so that what C++ prints (NCCL, CUDA) is there too. A log that cannot be written is one warning.

    Args:
        run_dir: The run's; where it does not exist, nothing is kept.
        rank: Of this process.

    Attributes:
        file: The log.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.file = RunDir(run_dir).logs / f"rank-{rank}.log"
        self._tee: subprocess.Popen[bytes] | None = None
        self._before: list[int] = []  # stdout and stderr
        if not run_dir.is_dir():
            return
        try:
            self.file.parent.mkdir(exist_ok=True)
            self.file.touch()
            self.note(f"[{time.strftime('%FT%T')} rank {rank} starts on {socket.gethostname()}, process {os.getpid()}]")
            self._start()
        except OSError as error:
            print(f"warning: rank {rank} keeps no log ({error})", file=sys.stderr)

    def _start(self) -> None:
        global _terminal
        _terminal = sys.stderr.isatty()
        _flush()
        end, out, err = os.pipe(), os.pipe(), os.pipe()
        self._tee = subprocess.Popen(
            [sys.executable, "-IS", str(_TEE), str(self.file), str(out[0]), str(err[0])],
            stdin=end[0],
            pass_fds=(out[0], err[0]),
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._end = end[1]  # of no child of ours, so it closes with this process
        for read in (end[0], out[0], err[0]):
            os.close(read)
        for number, write in ((1, out[1]), (2, err[1])):
            self._before.append(os.dup(number))
            os.dup2(write, number)
            os.close(write)

    def note(self, text: str) -> None:
        """Append lines to the log alone, if there is room for them."""
        with suppress(OSError), self.file.open("a", encoding="utf-8") as stream:
            stream.write(text.rstrip("\n") + "\n")

    def close(self) -> None:
        """All is written; stdout and stderr are what they were."""
        if self._tee is None:
            return
        _flush()
        for number, before in enumerate(self._before, 1):
            os.dup2(before, number)
            os.close(before)
        os.close(self._end)
        self._tee.wait()
        self._tee = None


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
