"""What the front end says of ranks that fail, and what these leave behind: nothing."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from common.errors import UserError
from tests.train import world
from train import worker
from train.config import RunConfig
from train.process import launch


def bug(run_dir: Path) -> int:
    if os.environ["RANK"] == "1":
        raise RuntimeError("a bug")
    return 0


def refusal(run_dir: Path) -> int:
    if os.environ["RANK"] == "1":
        raise UserError("this file is damaged")
    return 0


def killed(run_dir: Path) -> int:
    os.kill(os.getpid(), 9)
    return 0


@pytest.mark.parametrize(
    ("run", "message", "said"),
    [
        (bug, "rank 1 raised the error above", "RuntimeError: a bug"),
        (refusal, "^this file is damaged$", ""),
        (killed, "rank [01] ended with SIGKILL; its output stands above and in .*/logs/rank-[01].log", ""),
    ],
)
def test_a_rank_that_fails_is_told_once_and_leaves_nothing(run, message, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(worker, "run", run)
    config = RunConfig()
    config.launch.workers = 2
    with pytest.raises(UserError, match=message):
        launch.run(config, tmp_path / "run")
    assert capsys.readouterr().err.count("Traceback") == bool(said)
    assert [*(tmp_path / "tmp").iterdir(), *(tmp_path / "run").iterdir()] == [tmp_path / "run/logs"]
    kept = (tmp_path / "run/logs/rank-1.log").read_text()
    assert kept.startswith("[") and (said or message.strip("^$") if run is not killed else "") in kept


@pytest.mark.parametrize("delay", [0.0, 0.5, 1.5])
def test_ranks_end_with_a_front_end_that_is_killed_before_their_first_step(delay, tmp_path):
    """They wait for its store, for each other, or load: nothing that a signal's handler would interrupt."""
    home, run = world.make(tmp_path / "world"), tmp_path / "run"
    process = world.start(world.overrides(home, run, "stage.steps=8"))
    front_end = psutil.Process(process.pid)
    world.wait_for(lambda: len(list((run / "logs").glob("rank-*.log"))) == 2, process)
    time.sleep(delay)
    ranks = front_end.children(recursive=True)
    os.kill(front_end.pid, signal.SIGKILL)
    process.wait(300)
    _, left = psutil.wait_procs(ranks, timeout=300)
    assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
