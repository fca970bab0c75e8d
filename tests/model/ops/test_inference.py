"""The op where no gradient is wanted, against plain torch."""

from __future__ import annotations

import pytest
import torch

from model.ops import NO_SAMPLE, Rows, inference, reference

D, R = 24, 4
ROWS = {
    "one for all": (1, None),
    "one for all, said": (3, Rows.padded([2, 2, 2], 3)),
    "each its own": (3, None),
    "shared, and none": (2, Rows.padded([1, NO_SAMPLE, 1], 2)),
    "none": (2, Rows.padded([NO_SAMPLE] * 3, 2)),
}


@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_layout_of_rows_is_the_reference(rows, dtype, length):
    samples, layout = rows
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, bias = random(3, length, D), random(8)
    weights, a, b = [random(8, D), random(6, D)], [random(samples, D, R) for _ in "qk"], [random(R, 8), random(R, 6)]
    joined = inference.join(a, b, 0.5, layout)
    few = dtype != torch.bfloat16 or 3 * length <= 64
    assert joined is not None and joined.fits(x) == few
    if not few:
        return
    segments = (layout or Rows.padded([0] * 3 if samples == 1 else range(3), samples)).segments(length, x.device)
    wide = [t.double() for t in (x, *weights, *a, *b)]
    want = reference.lowrank_linear_group(
        wide[0].flatten(0, 1), wide[1:3], [bias.double(), torch.zeros(6).double()], wide[3:5], wide[5:], 0.5, segments
    )
    got = inference.lowrank_linear_group(x, weights, [bias, None], joined)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for mine, expected in zip(got, want, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double().flatten(0, 1), expected, rtol=tolerance, atol=tolerance * 10)
    one = inference.join(a[:1], b[:1], 0.5, layout)
    beside = inference.with_delta(torch.nn.functional.linear(x, weights[0], bias), x, one)
    torch.testing.assert_close(beside.double(), got[0].double(), rtol=tolerance, atol=tolerance * 10)
    plain = torch.nn.functional.linear(x, weights[0], bias)
    for number, sample in enumerate(() if layout is None else layout.sample):
        assert (sample != NO_SAMPLE) or got[0][number].equal(plain[number])  # exactly


def test_what_it_does_not_do_is_left_to_the_op():
    a, b = [torch.randn(2, D, R)], [torch.randn(R, 8)]
    packed = Rows.packed([0, 3, 5], [0, 1], 2)
    assert inference.join(a, b, 1.0, packed) is None
    assert inference.join(a, b, 1.0, packed.segments(0, torch.device("cpu"))) is None
    joined = inference.join(a, b, 1.0, None)
    assert joined is not None and joined.fits(torch.randn(2, 1, D))
    for other in (torch.randn(3, 1, D), torch.randn(2, D), torch.randn(2, 1, D).bfloat16()):
        assert not joined.fits(other)
