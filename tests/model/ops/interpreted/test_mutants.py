"""Deliberate kernel bugs, each of which the checks must catch: the proof that the proof is one.

Every mutant runs in a forked child, because the forbidden pages answer an access out of bounds with SIGSEGV.
"""

# ruff: noqa: E501 (a table of source lines)
from __future__ import annotations

import faulthandler
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from model.ops import triton
from tests.model.ops.interpreted.checks import cases, kernel_module

OPS = ("shrink", "expand", "factor_grad", "gemm", "merge")

MUTANTS = {
    # name: (which checks, text, its replacement)
    "shrink: rows past the segment are read": (
        "shrink",
        "x_tile = tl.load(x_tiles, mask=in_rows & in_k[None, :], other=0.0)",
        "x_tile = tl.load(x_tiles, mask=in_k[None, :] & (rows > -1)[:, None], other=0.0)",
    ),
    "shrink: rows past the segment are written": ("shrink", "mask = in_rows & in_cols\n", "mask = in_cols\n"),
    "shrink: d_in tail not masked": ("shrink", "in_k = (k + ks) < d_in\n            mask", "in_k = ks >= 0\n            mask"),
    "shrink: scale dropped": ("shrink", "round_to(acc1 * scale,", "round_to(acc1,"),
    "shrink: third projection reads the second's A": ("shrink", "a2 + a_offset, mask, EVEN", "a1 + a_offset, mask, EVEN"),
    "shrink: A pointer not advanced": ("shrink", "a_offset += BLOCK_K * a_row", "a_offset += 0"),
    "shrink: segment taken for sample": ("shrink", "s = tl.load(sample + segment)\n", "s = segment\n"),
    "shrink: rows without a sample get an update": ("shrink", "depth = tl.where(s >= 0, d_in, 0)", "depth = d_in"),
    "expand: r tail not masked": ("expand", "in_r = ((r0 + rs) < r)[None, :]\n            z_tile", "in_r = (rs >= 0)[None, :]\n            z_tile"),
    "expand: second block of r repeats the first": ("expand", "        z_tiles += BLOCK_R\n", ""),
    "expand: projection's z not selected": ("expand", "z_tiles + z_group, a1", "z_tiles, a1"),
    "factor_grad: rows of the next segment leak in": (
        "factor_grad",
        "in_rows = ((t0 + ts) < end)[:, None]",
        "in_rows = ((t0 + ts) < end + 1)[:, None]",
    ),
    "factor_grad: only the first segment of a sample": (
        "factor_grad",
        "range(tl.load(first + s), tl.load(first + s + 1))",
        "range(tl.load(first + s), tl.minimum(tl.load(first + s) + 1, tl.load(first + s + 1)))",
    ),
    "factor_grad: segments not looked up by sample": ("factor_grad", "segment = tl.load(order + i)", "segment = i"),
    "factor_grad: wrong sample written": ("factor_grad", "out = da + s.to(tl.int64) * d_in * r", "out = da + 0 * d_in * r"),
    "gemm: last segment of a tile skipped": ("gemm", "range(lowest, highest + 1)", "range(lowest, highest)"),
    "gemm: row ownership ignored": ("gemm", "mine = (segment_of == segment)[:, None]", "mine = (segment_of >= 0)[:, None]"),
    "gemm: missing sample not skipped": ("gemm", "depth = tl.where(s >= 0, r, 0)\n            sample_tiles", "depth = r\n            sample_tiles"),
    "gemm: d tail not masked": ("gemm", "in_k = (k + ks) < d\n", "in_k = ks >= 0\n"),
    "gemm: low-rank part lost": ("gemm", "    x_tiles = x + safe_rows", "    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n    x_tiles = x + safe_rows"),
    "gemm: accumulator not read": ("gemm", "    if ADD:\n", "    if False:\n"),
    "gemm: bias dropped": ("gemm", "    if BIAS:\n", "    if False:\n"),
    "merge: piece's offset lost": ("merge", "w + (flat - lo)", "w + (flat - lo // d_in * d_in)"),
    "merge: piece's end ignored": ("merge", " & (flat >= lo) & (flat < hi)", " & (flat >= lo)"),
    "merge: first row of the piece wrong": ("merge", "n0 = lo // d_in +", "n0 = tl.cdiv(lo, d_in) +"),
    "merge: every matrix has the first one's width": ("merge", "d_in = tl.load(width + p)", "d_in = tl.load(width)"),
    "interpreter: bf16 rounding truncates": ("merge", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
    "interpreter: bf16 products of raw bits": ("shrink", "        left = left.to(tl.float32)\n        right = right.to(tl.float32)\n", "        pass\n"),
}  # fmt: skip


PASSED, WRONG_VALUE, DID_NOT_RUN = 0, 1, 2


def source(file: str) -> str:
    """The text of one file of `model/ops/triton`."""
    return Path(triton.__file__).with_name(f"{file}.py").read_text()


def run(text: str, file: str, op: str, path: Path) -> int:
    """Run all checks of `op` in a child where `text` stands for `file`; its exit code, or minus its signal."""
    path.write_text(text)
    child = os.fork()
    if child == 0:
        code = DID_NOT_RUN
        try:
            faulthandler.disable()  # a crash is an expected outcome
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            name = f"{triton.__name__}.{file}"
            for loaded in [m for m in sys.modules if m.startswith(f"{triton.__name__}.")]:
                del sys.modules[loaded]  # an op imports the mutated common.py anew
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            for case, check in cases(full=False):
                if case.split()[0] == op:
                    check(kernel_module(case))
            code = PASSED
        except AssertionError:
            code = WRONG_VALUE
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("op", OPS)
def test_unchanged_source_passes(op, tmp_path):
    assert run(source(op), op, op, tmp_path / "unchanged.py") == PASSED


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, tmp_path):
    op, text, replacement = MUTANTS[name]
    file = "common" if name.startswith("interpreter") else op
    assert text in source(file), "the kernel changed: update the mutant"
    # A text that stands several times in the file is mutated everywhere.
    mutant = source(file).replace(text, replacement)
    assert run(mutant, file, op, tmp_path / "mutant.py") in (WRONG_VALUE, -signal.SIGSEGV)
