"""What a rank printed is in its log and where it was printed, however the rank ended."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.process.rank_log import RankLog

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from train.process.rank_log import RankLog
log = RankLog(Path(sys.argv[1]), 5)
print("by Python")
print("to stderr", file=sys.stderr)
sys.stdout.flush()
os.write(2, b"by C++\\n")
for step in range(3):
    print(f"\\r{step} steps", end="", file=sys.stderr, flush=True)
print("\\r        \\rwarning", file=sys.stderr, flush=True)
# A child that outlives the rank keeps stdout and stderr open.
child = subprocess.Popen(["sh", "-c", "echo by a child; exec sleep 30"])
while "by a child" not in log.file.read_text().rpartition("starts on")[2]:
    pass
exec(sys.argv[2])
"""
LINES = {"by Python", "to stderr", "by C++", "warning", "by a child"}


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("log.close(); assert child.poll() is None; child.kill()", 0, set()),
        ("os.kill(0, 9)", -signal.SIGKILL, set()),  # the whole process group
        ("print('last'); sys.stdout.flush(); os._exit(1)", 1, {"last"}),
        ("print('no end', end=''); sys.stdout.flush(); os._exit(1)", 1, {"no end"}),
        ("print('last'); log.close(); print('after')", 0, {"last"}),
    ],
)
def test_all_is_kept_once_however_it_ends(tmp_path: Path, end: str, code: int, last: set[str]) -> None:
    for _ in range(2):
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(tmp_path), end], stdout=out, stderr=err, start_new_session=True
            )
        assert done.returncode == code
    lines = wait_for_end(tmp_path / "logs/rank-5.log")
    second = next(i for i in range(1, len(lines)) if "starts on" in lines[i])
    for part in (lines[:second], lines[second:]):
        assert re.fullmatch(r"\[\d{4}-.* rank 5 starts on \S+, process \d+\]", part[0])
        assert sorted(part[1:]) == sorted(LINES | last)  # two streams: in any order
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_bytes()
    assert {"by Python", "by a child"} | last <= {*out.splitlines()} <= LINES | last | {"after"}
    assert err == b"to stderr\nby C++\n\r0 steps\r1 steps\r2 steps\r        \rwarning\n"


def wait_for_end(log: Path) -> list[str]:
    """Lines of a log to which nothing was added for a moment."""
    before = None
    while before != (before := log.read_text()):
        time.sleep(0.5)
    return before.splitlines()


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file")
    log = RankLog(tmp_path, 0)
    print("said", flush=True)
    log.close()
    said = capfd.readouterr()
    assert said.out == "said\n" and said.err.startswith("warning: rank 0 keeps no log (") and said.err.count("\n") == 1
    RankLog(tmp_path / "absent", 0).close()
    assert not (tmp_path / "absent").exists()
