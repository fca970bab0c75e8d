"""`python -m benchmarks.gpu` without a GPU: every part runs, and a part that dies costs nobody else a row."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu.__main__ import parts, run_part
from benchmarks.gpu.part import Context
from benchmarks.gpu.results import Results, tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu runs it for real")
def test_all_parts_run_under_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--minutes", "60"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "gpu.json")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / "gpu.json").read_text())
    broken = {name: part.get("error") for name, part in found["parts"].items() if part["status"] != "ok"}
    assert broken == {}, done.stderr[-3000:]
    assert set(found["parts"]) == {"device", *parts()}
    assert all(part["rows"] for part in found["parts"].values())
    assert found["environment"]["torch"] == version("torch")
    assert found["parts"]["step-vlora"]["rows"]["step"]["samples_per_s"] > 0
    saved = found["parts"]["saving"]["rows"]["mlp over vlora"]
    assert saved["FLOPs"] > 1
    printed = done.stdout[done.stdout.index("### device") :]
    assert all(f"### {name}" in printed for name in parts())


def raises(context: Context) -> None:
    context.row("before", {"value": 1})
    raise ValueError("a wrong number")


def crashes(context: Context) -> None:
    context.row("before", {"value": 2})
    faulthandler.disable()  # its stack among the tests would look like an accident
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(context: Context) -> None:
    child = subprocess.Popen(["sleep", "600"])
    context.row("child", {"pid": child.pid})
    time.sleep(600)


def works(context: Context) -> None:
    context.row("after", {"value": 3.0})


def test_a_part_that_dies_keeps_its_rows_and_harms_no_other(tmp_path, capfd):
    results = Results(tmp_path / "gpu.json")
    results.environment({"device": "none"})
    for action, seconds in ((raises, 30), (crashes, 30), (hangs, 1.0), (works, 30)):
        name = action.__name__
        run_part(name, action, seconds, Context(name, torch.device("cpu"), True, results))
    found = results.read()["parts"]
    assert [part["status"] for part in found.values()] == ["failed", "failed", "timeout", "ok"]
    assert found["raises"]["rows"] == {"before": {"value": 1}}
    assert found["raises"]["error"] == "ValueError: a wrong number"
    assert found["crashes"]["rows"] == {"before": {"value": 2}}
    assert found["crashes"]["error"] == "ended by signal 11"
    child = found["hangs"]["rows"]["child"]["pid"]  # what a part started ends with it
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert "| after | 3 |" in tables(results.read())
