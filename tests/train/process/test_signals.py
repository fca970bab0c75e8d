"""Stop requests of a single process; what all ranks make of them is in test_runs.py and tests/slurm."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.process.signals import SIGNALS, StopRequest

PROGRAM = """
import sys, time
from pathlib import Path
from train.process.signals import StopRequest
stop = StopRequest(Path("."), grace_seconds=0.5)
stop.install()
print("ready", flush=True)
while stop.reason is None:
    time.sleep(0.01)
if sys.argv[1] == "done":
    stop.done()
time.sleep(1.5)
print(stop.reason)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_that_takes_too_long_ends_the_process_and_says_so(number: signal.Signals) -> None:
    done, out, err = run("hangs", number)
    assert done == 1 and out == ""
    assert f"error: {number.name} came 0 s ago and the step still has not ended" in err
    assert "last complete one stays valid" in err


def test_a_stop_carried_out_in_time_ends_nothing() -> None:
    done, out, err = run("done", signal.SIGTERM)
    assert (done, out, err) == (0, "SIGTERM\n", "")


def test_the_stop_file_is_seen_between_steps(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path)
    assert not stop.agreed(torch.device("cpu"))
    stop.file.touch()
    assert stop.agreed(torch.device("cpu")) and stop.reason == "stop file"


def run(what: str, number: signal.Signals) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.send_signal(number)  # impatience starts no second clock
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
