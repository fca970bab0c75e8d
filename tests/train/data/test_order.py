"""The global order: permutations, mixtures and dialogue draws."""

import numpy as np
import pytest

from train.data.order import MixtureOrder, Permutation, draw_dialogues


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_permutation_hits_everything_once(size):
    assert sorted(Permutation(size, 3)(np.arange(size)).tolist()) == list(range(size))


PINNED = [36, 833, 976, 662, 95, 487, 800, 535]


def test_permutation_is_fixed_for_ever():
    """Checkpoints name positions of this order, so it must never change: numbers recorded when it was written."""
    assert Permutation(1000, 0, 1, 2)(np.arange(8)).tolist() == PINNED


def test_permutation_looks_random():
    size = 4096
    images = np.stack([Permutation(size, key)(np.arange(size)) for key in range(50)]).astype(float)
    correlation = np.corrcoef(np.arange(size), images)[0, 1:]
    assert np.abs(correlation).max() < 5 / np.sqrt(size)
    steps = np.diff(images, axis=1)
    assert np.mean(np.abs(steps) == 1) < 0.002  # neighbours do not stay neighbours
    fixed = (images == np.arange(size)).sum(1)
    assert 0.3 < fixed.mean() < 2.5  # one fixed point on average


def test_any_part_of_the_stream_alone_equals_that_part_of_the_whole():
    order = MixtureOrder([50, 20, 7], [1.0, 0.5, 2.0], seed=9)
    whole = order(0, 500)
    for start, count in ((0, 3), (70, 20), (73, 1), (140, 300)):
        part = order(start, count)
        for name in ("source", "sample", "epoch"):
            assert getattr(part, name).tolist() == getattr(whole, name)[start : start + count].tolist()


def test_mixture_shares_and_passes():
    order = MixtureOrder([50, 20, 7], [1.0, 0.5, 2.0], seed=9)
    assert order.epoch_size == 50 + 10 + 14
    one, two = order(0, 74), order(74, 74)
    for draws in (one, two):
        assert np.bincount(draws.source).tolist() == [50, 10, 14]
        assert sorted(draws.sample[draws.source == 0].tolist()) == list(range(50))
        assert sorted(draws.sample[draws.source == 2].tolist()) == sorted([*range(7), *range(7)])
    halves = [draws.sample[draws.source == 1].tolist() for draws in (one, two)]
    assert sorted(halves[0] + halves[1]) == list(range(20))  # two half epochs show everything once
    assert one.sample.tolist() != two.sample.tolist()
    assert MixtureOrder([50], [1], 1)(0, 50).sample.tolist() != MixtureOrder([50], [1], 2)(0, 50).sample.tolist()


def test_impossible_mixtures():
    for sizes, weights in (([], []), ([5], [0.01]), ([0], [1.0])):
        with pytest.raises(ValueError, match="must be above 0"):
            MixtureOrder(sizes, weights, 0)


def test_dialogues_are_all_used_in_turn():
    seen = [draw_dialogues(10, 4, seed=1, source=0, sample=5, epoch=epoch) for epoch in range(5)]
    assert all(len(set(chosen)) == 4 and chosen == sorted(chosen) for chosen in seen)
    assert set(seen[0] + seen[1] + seen[2]) == set(range(10))
    assert np.bincount(np.concatenate(seen)).tolist() == [2] * 10
    assert draw_dialogues(3, 4, 1, 0, 5, 0) == [0, 1, 2] == draw_dialogues(3, None, 1, 0, 5, 0)
    others = {tuple(draw_dialogues(10, 4, 1, 0, sample, 0)) for sample in range(20)}
    assert len(others) > 10
