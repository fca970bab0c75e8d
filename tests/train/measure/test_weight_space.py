import numpy as np
import pytest

from train.measure.weight_space import WeightSpace


def space_of(vectors: np.ndarray) -> WeightSpace:
    return WeightSpace([f"s{n}" for n in range(len(vectors))], vectors @ vectors.T)


def test_effective_rank_counts_directions():
    random = np.random.default_rng(0)
    for rank in (1, 3, 8):
        axes = np.linalg.qr(random.normal(size=(500, rank)))[0]
        # Equal variance along each axis around a mean that all share.
        values = np.concatenate([np.eye(rank), -np.eye(rank)]) @ axes.T + 7 * random.normal(size=500)
        assert space_of(values).effective_rank == pytest.approx(rank, abs=1e-6)
    assert space_of(np.ones((5, 9))).effective_rank == 0 and space_of(np.zeros((5, 9))).effective_rank == 0
    spectrum = np.array([0.5, 0.25, 0.25])
    values = np.concatenate([np.diag(np.sqrt(spectrum)), -np.diag(np.sqrt(spectrum))])
    assert space_of(values).effective_rank == pytest.approx(2**1.5)


def test_nearest_and_shared_against_the_vectors_themselves():
    vectors = np.random.default_rng(1).normal(size=(12, 40)) + 2
    space = space_of(vectors)
    apart = vectors - vectors.mean(0)
    cosines = apart @ apart.T
    cosines /= np.sqrt(np.outer(np.diag(cosines), np.diag(cosines)))
    for number, found in enumerate(space.nearest(3)):
        expected = sorted((c, n) for n, c in enumerate(cosines[number]) if n != number)[::-1][:3]
        assert [n for n, _ in found] == [n for _, n in expected]
        assert [c for _, c in found] == pytest.approx([c for c, _ in expected])
    mean = vectors.mean(0)
    assert space.shared == pytest.approx(12 * mean @ mean / (vectors**2).sum())


def test_what_is_written_is_read_again():
    space = space_of(np.random.default_rng(2).normal(size=(4, 9)))
    again = WeightSpace.read(space.as_dict())
    assert again.samples == space.samples and np.allclose(again.products, space.products, rtol=1e-5)
    assert WeightSpace.read(None) is None
    with pytest.raises(ValueError, match="weights of 4 samples"):
        WeightSpace.read(space.as_dict() | {"products": [[1.0]]})
