"""The op moves a tenth of what indexing the generator's output and two einsums move, counted at real 7B shapes."""

from benchmarks.traffic import low_rank_backward


def test_backward_traffic():
    found = low_rank_backward()
    base, ours = found["einsum and index"], found["ours"]
    assert ours.bytes <= 0.10 * base.bytes
    assert ours.kernels <= base.kernels
    assert ours.bytes <= found["einsum and unbind"].bytes
