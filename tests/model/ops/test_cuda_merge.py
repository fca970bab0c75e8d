"""The CUDA C++ merge without a GPU: found, chosen, compiled within budget; its source run on CPU threads."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from model.ops import Placed, set_merge
from model.ops.cuda import build
from model.ops.cuda import merge as cuda_merge
from model.ops.merge import merged_weights

ROOT = Path(__file__).resolve().parents[3]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def build_for_cpu(library: Path, *extra: str) -> None:
    """Compile the same source for CPU threads: slow by design, but the sanitizers can watch it."""
    command = ["g++", "-O1", "-g", "-std=c++20", "-x", "c++", "-fPIC", "-shared", "-pthread", *extra]
    subprocess.run([*command, str(build.SOURCE), "-o", str(library)], check=True, capture_output=True)


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


@needs_nvcc
@pytest.mark.slow
def test_compiles_within_budget(extensions, monkeypatch):
    """By the documented command's defaults, without a GPU: A100 and H100."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    library, report = build.build(build.DEFAULT_TARGETS, "-Xptxas", "-v")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(registers) == 2
    assert all(n <= 96 for n in registers), "fewer than 5 blocks of 128 threads per multiprocessor"
    assert spills == [("0", "0")] * 2
    assert hasattr(ctypes.CDLL(str(library)), "vlora_merge_bf16")  # loads without a driver
    assert [build.find(c) for c in ((8, 0), (8, 6), (9, 0), (12, 0))] == [library] * 4
    assert build.find((7, 5)) is None
    assert build.build(build.DEFAULT_TARGETS) == (library, "")  # not compiled again


def test_targets_are_those_of_pytorch_extensions(extensions, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0a+PTX")
    assert build.targets() == "8.0;8.6;9.0a+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(UserError, match="TORCH_CUDA_ARCH_LIST names 'Ampere'"):
        build.build()
    folder = extensions / "vlora"
    folder.mkdir(exist_ok=True)
    (folder / "merge-000000000000-9.0.so").touch()  # of another source
    assert build.find((9, 0)) is None
    monkeypatch.setattr(build, "_digest", lambda: "000000000000")
    assert build.find((9, 0)) is not None
    (folder / "merge-000000000000-10.0a+PTX.so").touch()  # architecture-specific: of that GPU alone
    assert build.find((10, 0)) is not None
    assert build.find((10, 3)) is None
    assert build.find((12, 0)) is None


def test_no_compiler_is_one_line(extensions, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs nvcc"):
        build.build("8.0")


def test_choice_is_checked_and_reached(monkeypatch):
    cpu = torch.device("cpu")
    assert set_merge("auto", cpu) == "torch"
    for name, message in (("cuda", "needs a CUDA device"), ("triton", "needs"), ("cuda ", "choose one of")):
        with pytest.raises(ValueError, match=message):
            set_merge(name, cpu)
    launched = []
    monkeypatch.setattr(cuda_merge, "merge", lambda sources, *rest: launched.append(len(sources)))
    set_merge("cuda")
    weights = [torch.zeros(4, 8, dtype=d) for d in (torch.bfloat16, torch.bfloat16, torch.float32)]
    factors = [Placed("q", w, torch.zeros(8, 2).to(w.dtype), torch.zeros(2, 4).to(w.dtype)) for w in weights]
    merged_weights(weights, factors, 1.0)
    set_merge("auto")
    assert launched == [2, 1]  # one launch per dtype


def test_other_dtypes_are_refused():
    w = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="bf16"):
        cuda_merge.merge([w], [w], [torch.zeros(8, 2)], [torch.zeros(2, 4)], 1.0)
