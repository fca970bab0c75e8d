"""A run in which a rank stands still: who, where, and in the configured time; then the run resumes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from tests.train import world
from train.process.watchdog import Watchdog, _behind
from train.process.watchdog import beat as beat_


@pytest.mark.slow
def test_a_stopped_rank_is_reported_with_the_stacks_of_all(tmp_path):
    """SIGSTOP to one of two ranks: both write their stacks, the line names the rank, and the next start finishes."""
    home, run = world.make(tmp_path / "world"), tmp_path / "run"
    arguments = world.overrides(home, run, "stage.steps=30", "checkpoint.every=2")
    process = world.start([*arguments, "engine.hang_minutes=0.2"])
    world.wait_for(lambda: world.steps_done(run) >= 3, process)
    victim = json.loads((run / "hang" / "rank-1.json").read_text())["pid"]
    os.kill(victim, signal.SIGSTOP)
    _, said = process.wait(300)
    assert process.returncode != 0
    assert "did not move for 12 s (engine.hang_minutes)" in said
    assert f"process {victim}) has not run for" in said
    for rank in (0, 1):
        (file,) = (run / "hang").glob(f"stacks-rank-{rank}-*.txt")
        assert "train/engine/loop.py" in file.read_text(), file
    done = world.train(arguments)
    assert done.returncode == 0, done.stderr
    assert world.steps_done(run) == 30
    assert len(list((run / "hang").glob("stacks-rank-*.txt"))) == 2  # the report is kept, nothing was added


def test_a_run_that_moves_leaves_nothing_behind(tmp_path):
    with Watchdog(tmp_path, 0, 0.4) as dog:
        for _ in range(10):
            beat_()
            time.sleep(0.1)
        assert dog.count == 10
        assert json.loads((tmp_path / "hang" / "rank-0.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "hang").exists()


def test_a_record_that_is_being_written_at_the_end_goes_too(tmp_path, monkeypatch):
    writing = threading.Event()

    def slowly(path, text):
        part = path.with_suffix(".part")
        part.write_text(text)
        writing.set()
        time.sleep(0.3)
        part.rename(path)

    with Watchdog(tmp_path, 0, 0.5):
        monkeypatch.setattr("train.process.watchdog.write_atomically", slowly)
        assert writing.wait(60)
    time.sleep(0.5)
    assert not (tmp_path / "hang").exists()


def test_nothing_is_watched_before_the_first_step(tmp_path):
    """Loading and compiling take what they take."""
    with Watchdog(tmp_path, 0, 0.2):
        time.sleep(0.6)


@pytest.mark.parametrize(
    ("ages", "progress", "who"),
    [
        ((0, 40, 1), (9, 9, 9), "rank 1 (n, process 101) has not run for 40 s"),
        ((0, 0.5, 1), (9, 9, 8), "behind the others is rank 2"),
        ((0, 0.5, 1), (9, 9, 9), "all ranks came equally far"),
    ],
)
def test_who_is_behind(ages, progress, who):
    ranks = {
        rank: {"host": "n", "pid": 100 + rank, "progress": done, "time": 1000 - age}
        for rank, (age, done) in enumerate(zip(ages, progress, strict=True))
    }
    assert who in _behind(ranks, seconds=60)


def test_a_start_beside_the_ranks_of_a_killed_one(tmp_path):
    """A rank whose front end was killed leaves when its step ends, and the next start may come before that."""
    old = Watchdog(tmp_path, 0, 60.0)
    old._started = "20260101-000000"
    old.__enter__()
    with Watchdog(tmp_path, 0, 60.0) as new:
        (tmp_path / "hang" / "rank-0.json").write_text(json.dumps({"host": "n", "pid": os.getpid() + 1, "time": 0.0}))
        old.__exit__()
        assert (tmp_path / "hang" / "rank-0.json").exists()  # it is the new rank's
        assert os.path.samestat(os.fstat(new._stacks.fileno()), os.stat(new._stacks.name))
        (tmp_path / "hang" / "rank-0.json").unlink()
    assert not (tmp_path / "hang").exists()


def test_the_folder_goes_while_a_start_opens_its_file(tmp_path, monkeypatch):
    dog, gone = Watchdog(tmp_path, 0, 60.0), []
    file = dog._file

    def leaving(kind, suffix):
        if not gone:
            gone.append(dog.folder.rmdir())
        return file(kind, suffix)

    monkeypatch.setattr(dog, "_file", leaving)
    with dog:
        assert len(list((tmp_path / "hang").glob("stacks-*"))) == 1 and gone
