"""The low-rank op, forward and every gradient, by each backend against float64, in all layouts of rows."""

from __future__ import annotations

import pytest
import torch

from model.ops import set_backend
from tests.gpu.conftest import INTERPRETED
from tests.model.ops.test_lowrank import LAYOUTS, group, inputs

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
WHERE = ["shared, missing, unused"] if INTERPRETED else list(LAYOUTS)


@pytest.fixture(autouse=True)
def default_backend():
    yield
    set_backend("auto")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["hybrid", "fused"])
def test_values_and_gradients(where, dtype, backend, device):
    if where == "no sample at all":
        pytest.skip("a has no sample: nothing to launch")
    rows, tensors = inputs(where, dtype)
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def everything(tensors, name):
        set_backend(name, device)
        outputs = group(rows, tensors)
        # No cancellation: a sum near zero has no relative accuracy in bf16.
        weighted = ((y * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype, device=device)).sum() for y in outputs)
        loss = sum(weighted)
        return [*outputs, *torch.autograd.grad(loss, tensors, materialize_grads=True)]

    for got, want in zip(everything(tensors, backend), everything(wide, "reference"), strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm() + 1e-12
