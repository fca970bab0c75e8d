"""Merging one sample into the weights: exact restoring, equal logits, and the types that refuse."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.ops import MERGEABLE, Placed, lowrank_linear, merge_, merge_errors, restore_

SCALE = 0.25


def placed(dtype: torch.dtype, size: float = 0.03) -> list[Placed]:
    """One projection of every mergeable type, grouped-query shapes, with updates of relative size `size`."""
    torch.manual_seed(0)
    shapes = {
        "q": (48, 48),
        "k": (16, 48),
        "v": (16, 48),
        "o": (48, 48),
        "gate": (80, 48),
        "up": (80, 48),
        "down": (48, 80),
    }
    found = []
    for kind in MERGEABLE:
        d_out, d_in = shapes[kind]
        w, a, b = torch.randn(d_out, d_in), torch.randn(d_in, 8), torch.randn(8, d_out)
        a *= size * w.norm() / (SCALE * (a @ b).norm())
        found.append(Placed(kind, torch.nn.Parameter(w.to(dtype)), a.to(dtype), b.to(dtype)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_is_one_rounding_and_restoring_is_exact(dtype):
    projections = placed(dtype)
    before = [p.weight.detach().clone() for p in projections]
    merged = merge_(projections, SCALE)
    for p, w in zip(projections, before, strict=True):
        want = w.double() + SCALE * (p.a.double() @ p.b.double()).t()
        # One ulp where the fp32 sum falls on the other side of a tie.
        torch.testing.assert_close(p.weight.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert p.weight.dtype == dtype
        assert isinstance(p.weight, torch.nn.Parameter)
        assert not torch.equal(p.weight, w)
    restore_(merged)
    assert all(torch.equal(p.weight, w) for p, w in zip(projections, before, strict=True))


def test_no_drift_over_many_images():
    projections = placed(torch.bfloat16)
    before = [p.weight.detach().clone() for p in projections]
    for i in range(50):
        factors = [Placed(p.kind, p.weight, p.a * (i + 1), p.b) for p in projections]
        restore_(merge_(factors, SCALE))
    assert all(torch.equal(p.weight, w) for p, w in zip(projections, before, strict=True))


def test_merged_output_equals_the_branch():
    for p in placed(torch.float32):
        x = torch.randn(1, 7, p.a.shape[0])
        branch = lowrank_linear(x, p.weight, p.a[None], p.b, SCALE)
        merged = merge_([p], SCALE)
        torch.testing.assert_close(F.linear(x, p.weight), branch, rtol=1e-5, atol=1e-5)
        restore_(merged)


def test_rounding_loss_is_reported():
    """bf16 keeps about eight bits of W, so an update of relative size s is stored with error near 1.7e-3 / s."""
    for size in (0.1, 0.01):
        projections = placed(torch.bfloat16, size)
        errors = merge_errors(merge_(projections, SCALE), projections, SCALE)
        assert [e.kind for e in errors] == list(MERGEABLE)
        for e in errors:
            assert e.size == pytest.approx(size, rel=0.05)
            assert 1e-3 < e.error * e.size < 2.5e-3
    projections = placed(torch.float32)
    assert all(e.error < 1e-5 for e in merge_errors(merge_(projections, SCALE), projections, SCALE))


def test_refusals():
    q = placed(torch.float32)[0]
    before = q.weight.detach().clone()
    for bad, message in (
        ([q, Placed("m", q.weight, q.a, q.b)], "type 'm' cannot be merged"),
        ([Placed("x", q.weight, q.a, q.b)], "unknown type 'x'"),
        ([q, q], "named twice"),
        ([Placed("q", q.weight, q.a[:3], q.b)], "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_(bad, SCALE)
        assert torch.equal(q.weight, before)
