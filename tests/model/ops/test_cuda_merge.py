"""The CUDA C++ merge without a GPU: compiled for sm_80 and sm_90 within budget; its source run on CPU threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.ops.cuda.merge import ARCHITECTURES, build_for_cpu, build_for_gpu

ROOT = Path(__file__).resolve().parents[3]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def run(library: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(Path(__file__).with_name("sanitized_merge.py")), str(library)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, env=env, capture_output=True, text=True)


@needs_gxx
def test_values(tmp_path):
    build_for_cpu(tmp_path / "merge.so")
    result = run(tmp_path / "merge.so")
    assert result.returncode == 0, result.stderr[-2000:]


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "runtime"), [("address", "libasan.so"), ("thread", "libtsan.so")])
def test_sanitized(sanitizer, runtime, tmp_path):
    build_for_cpu(tmp_path / "merge.so", f"-fsanitize={sanitizer}")
    preload = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True).stdout.strip()
    if not Path(preload).is_file():
        pytest.skip(f"{runtime} is not installed")
    # Python itself leaks, and its own threads are not instrumented.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    result = run(tmp_path / "merge.so", LD_PRELOAD=preload, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Sanitizer" not in result.stderr, result.stderr[:3000]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_compiles_within_budget(tmp_path):
    report = build_for_gpu(tmp_path / "merge.so", "-Xptxas", "-v")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(registers) == len(ARCHITECTURES)
    assert all(n <= 96 for n in registers), "fewer than 5 blocks of 128 threads per multiprocessor"
    assert spills == [("0", "0")] * len(ARCHITECTURES)
