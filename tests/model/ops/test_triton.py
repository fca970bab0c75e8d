"""Starts the tests that need Triton in processes of their own.

`TRITON_INTERPRET` is read when Triton is imported, so interpreted kernels and ahead-of-time compilation cannot share
a process with each other or with the rest of the suite.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (requirements.txt)")


def run_pytest(*paths: str, interpret: bool) -> None:
    """Run `paths` below tests/model/ops in one process and fail with its report."""
    env = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/model/ops/{p}" for p in paths)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@needs_triton
def test_kernels_whole_model_and_benchmark_match_float64():
    names = ("test_kernels.py", "test_model.py", "test_benchmark.py")
    run_pytest(*(f"interpreted/{name}" for name in names), interpret=True)


@needs_triton
@pytest.mark.slow
def test_mutants_are_caught():
    run_pytest("interpreted/test_mutants.py", interpret=True)


@needs_triton
@pytest.mark.slow
def test_compiled_kernels_keep_their_budgets():
    run_pytest("compiled/test_resources.py", interpret=False)
