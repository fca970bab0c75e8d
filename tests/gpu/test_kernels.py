"""Every Triton kernel and the CUDA merge on the device against float64: ragged segments, odd shapes, NaN-poisoned."""

from __future__ import annotations

import shutil

import pytest
import torch

from model.ops import Placed, set_merge
from model.ops.merge import merged_weights
from tests.gpu.conftest import INTERPRETED
from tests.model.ops.interpreted.checks import cases, kernel_module

CASES = cases(full=not INTERPRETED)[:: 6 if INTERPRETED else 1]
"""Under the interpreter a few: tests/model/ops/interpreted runs them all."""


@pytest.mark.parametrize(("name", "check"), CASES, ids=[name for name, _ in CASES])
def test_kernel(name, check):
    check(kernel_module(name))


def factors(device: torch.device, dtype: torch.dtype, r: int) -> list[Placed]:
    """Whole tiles, ragged shapes, and more matrices than one CUDA launch takes."""
    torch.manual_seed(r)
    shapes = [(256, 128), (130, 72), (33, 131), *[(16, 32)] * (4 if INTERPRETED else 70)]
    return [
        Placed("q", *(torch.randn(s, device=device).to(dtype) for s in ((d_out, d_in), (d_in, r), (r, d_out))))
        for d_out, d_in in shapes
    ]


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("r", [16, 40, 64])
def test_merge(name, r, device):
    if name == "cuda" and (INTERPRETED or shutil.which("nvcc") is None):
        pytest.skip("needs a GPU and nvcc")
    placed = factors(device, torch.bfloat16, r)
    pristine = [p.weight for p in placed]
    try:
        assert set_merge(name, device) == name
        got = merged_weights(pristine, placed, 0.25)
    finally:
        set_merge("auto")
    for w, p in zip(got, placed, strict=True):
        want = p.weight.double() + 0.25 * (p.a.double() @ p.b.double()).t()
        assert ((w.double() - want).norm() / want.norm()).item() < 2.3e-3
