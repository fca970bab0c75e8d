"""One rank of ZeRO-3 on the device (NCCL on a GPU) against plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import INTERPRETED

ROOT = Path(__file__).resolve().parents[2]


def test_three_zero3_steps_equal_plain_torch():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.engine_step"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["zero_stage"] == 3
    assert found["backend"] == ("gloo" if INTERPRETED else "nccl")
    assert found["worst"] < 5e-5, found
