"""Stop requests: signals and a stop file, agreed on by all ranks at a step boundary."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from train.process.run_files import RunDir

if TYPE_CHECKING:  # this module is installed before the imports that take seconds
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SET_DEATH_SIGNAL, _GET_DEATH_SIGNAL = 1, 2  # of Linux's prctl


def die_with(parent: int) -> None:
    """End this process at once when the process that started it is gone, until `StopRequest.begin`.

    A rank that starts waits for the store that its front end serves, and for the other ranks, in calls that no handler
    of Python's interrupts and that time alone would end. It has nothing to lose yet.
    """
    _prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:  # gone before
        os._exit(1)


def _prctl(option: int, argument: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, argument, 0, 0, 0)


class StopRequest:
    """Remembers that someone asked the run to stop.

    Any rank may be told, by signal or by the file `STOP` in the run directory (a signal can be lost while Python is
    still starting). The handler only sets a flag; the loop asks `agreed` at each step boundary.

    Args:
        run_dir: Where the stop file would be.
        grace_seconds: A stop not carried out this long after the signal ends the process with code 1 and says so,
            rather than leave the job to be killed in the middle of a write.
    """

    def __init__(self, run_dir: Path, grace_seconds: float = 600.0) -> None:
        self.file = RunDir(run_dir).stop
        self.grace_seconds = grace_seconds
        self.reason: str | None = None
        self._timer: threading.Timer | None = None

    def install(self) -> None:
        """Take over the signals. Call it first thing: before the imports that take seconds."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def begin(self) -> None:
        """From here on a lost front end (`die_with`) is a stop request too: the step in progress ends in order."""
        number = ctypes.c_int()
        _prctl(_GET_DEATH_SIGNAL, ctypes.byref(number))
        if number.value == signal.SIGKILL:  # nobody but a front end asks for it
            _prctl(_SET_DEATH_SIGNAL, int(signal.SIGINT))

    def _on_signal(self, number: int, frame: object) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._timer is None:
            self._timer = threading.Timer(self.grace_seconds, self._force)
            self._timer.daemon = True
            self._timer.start()

    def _force(self) -> None:
        print(
            f"error: {self.reason} came {self.grace_seconds:.0f} s ago and the step still has not ended; "
            "leaving without a new checkpoint (the last complete one stays valid)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was told to stop; the same answer on all ranks. Collective."""
        from train.process import distributed

        if self.reason is None and distributed.rank() == 0 and self.file.exists():
            self.reason = "stop file"
        return distributed.reduce([float(self.reason is not None)], device, "max")[0] > 0

    def done(self) -> None:
        """The stop is carried out: no forced exit any more."""
        if self._timer is not None:
            self._timer.cancel()
