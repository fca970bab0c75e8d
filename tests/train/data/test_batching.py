"""Steps and their cut into micro-batches, and the order at the size of real data sets."""

import tracemalloc

import numpy as np
import pytest

from train.data.batching import Batching, deal_by_tokens
from train.data.order import MixtureOrder

MILLION = 1_000_000


def sizes(draws):
    """A made-up data set: lengths with a long tail, one sample in seven without an image and long, a few with more."""
    key = draws.sample * 7919 + draws.source * 31
    images = np.where(key % 7 == 0, 0, 1 + (key % 11 == 0))
    length = 20 + key % 97 + np.where(key % 23 == 0, 900, 0) + np.where(images == 0, 500, 0)
    return images, length


def batching(group_by, count=1000, batch_size=32, window=5, seed=3, weights=(1.0,)):
    return Batching(
        MixtureOrder([count] * len(weights), list(weights), seed), batch_size, group_by, window, sizes, seed
    )


def names(draws):
    return list(zip(draws.source.tolist(), draws.sample.tolist(), draws.epoch.tolist(), strict=True))


def test_ungrouped_steps_are_the_order():
    steps = batching("none", weights=(1.0, 0.5))
    for number in (0, 7, 400):
        assert names(steps.step(number)) == names(steps.order(number * 32, 32))
    shares = [steps.deal(steps.step(3), rank, 4, 2) for rank in range(4)]
    assert [name for share in shares for part in share for name in names(part)] == names(steps.step(3))


@pytest.mark.parametrize("group_by", ["length", "length_modality"])
@pytest.mark.parametrize(("count", "window"), [(1000, 5), (1000, 1), (1000, 1000), (40, 7), (20, 3)])
def test_grouping_keeps_what_epochs_hold(group_by, count, window):
    """Also where an epoch is no whole number of steps, or smaller than one."""
    steps = batching(group_by, count, window=window)
    order = steps.order
    for epoch in range(4):
        first, last = steps.steps(epoch), steps.steps(epoch + 1)
        grouped = [name for number in range(first, last) for name in names(steps.step(number))]
        assert sorted(grouped) == sorted(names(order(first * 32, (last - first) * 32)))


@pytest.mark.parametrize("group_by", ["length", "length_modality"])
def test_any_step_alone_and_by_any_process(group_by):
    steps = batching(group_by)
    whole = [names(steps.step(number)) for number in range(80)]
    for number in (79, 0, 33, 12, 13):
        assert names(batching(group_by).step(number)) == whole[number]
    assert whole[0] != names(batching(group_by, seed=4).step(0))


def test_steps_of_similar_length():
    def spread(group_by):
        steps = batching(group_by)
        return np.mean([np.std(sizes(steps.step(number))[1]) for number in range(30)])

    assert spread("length") < 0.5 * spread("none")
    # Steps of one window come in no order of length.
    means = [sizes(batching("length").step(number))[1].mean() for number in range(5)]
    assert sorted(means) != means != sorted(means, reverse=True)


def test_every_step_holds_its_share_of_both_modalities():
    steps = batching("length_modality", window=8)
    for first in range(0, 24, 8):
        seeing = [int((sizes(steps.step(number))[0] > 0).sum()) for number in range(first, first + 8)]
        assert max(seeing) - min(seeing) <= 1 and 20 < min(seeing) < 32


@pytest.mark.parametrize("group_by", ["length", "length_modality"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (4, 2), (8, 4), (2, 16)])
def test_ranks_get_equal_work(group_by, world, accumulation):
    steps = batching(group_by)
    for number in (0, 17, 31):
        step = steps.step(number)
        parts = [steps.deal(step, rank, world, accumulation) for rank in range(world)]
        assert sorted(name for rank in parts for part in rank for name in names(part)) == sorted(names(step))
        for micro in zip(*parts, strict=True):
            assert {len(part.sample) for part in micro} == {32 // (world * accumulation)}
            images, length = (np.array([sizes(part)[which].sum() for part in micro]) for which in (0, 1))
            if group_by == "length":
                one = np.concatenate([sizes(part)[1] for part in micro])
                assert np.ptp(length) <= np.ptp(one)
            else:
                assert np.ptp(images) <= 2 and np.ptp([(sizes(part)[0] > 0).sum() for part in micro]) <= 1


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("budget", [600, 2500, 100_000])
def test_micro_batches_bounded_by_tokens(world, budget):
    rng = np.random.default_rng(world)
    tokens = np.concatenate([rng.integers(20, 400, 100), rng.integers(100, 1500, 28)])
    images = np.concatenate([np.ones(100, int), np.zeros(28, int)])
    dealt = deal_by_tokens(tokens, images, world, budget)
    assert {len(ranks) for ranks in dealt} == {world}
    every = np.concatenate([part for ranks in dealt for part in ranks])
    assert sorted(every.tolist()) == list(range(128))
    loads = np.array([[tokens[part].sum() for part in ranks] for ranks in dealt])
    assert loads.max() <= max(budget, tokens.max())
    seeing = np.array([[images[part].sum() for part in ranks] for ranks in dealt])
    assert seeing.max() == -(-100 // loads.size)  # an even share
    if budget == 2500:
        assert len(dealt) <= -(-tokens.sum() // (world * budget)) + 1
        assert np.ptp(loads, axis=1).max() < 0.1 * budget
    again = deal_by_tokens(tokens, images, world, budget)
    assert [[p.tolist() for p in ranks] for ranks in again] == [[p.tolist() for p in ranks] for ranks in dealt]


def test_tokens_of_few_or_dropped_samples():
    assert [[part.tolist() for part in ranks] for ranks in deal_by_tokens(np.array([5]), np.array([1]), 2, 100)] == [
        [[0], []]
    ]
    dealt = deal_by_tokens(np.zeros(4, int), np.array([1, 1, 0, 0]), 2, 10)
    assert len(dealt) == 1 and sorted(n for part in dealt[0] for n in part) == [0, 1, 2, 3]


def test_a_million_samples():
    order = MixtureOrder([MILLION], [1.0], seed=1)
    first, second = order(0, MILLION).sample, order(MILLION, MILLION).sample
    for epoch in (first, second):
        assert np.bincount(epoch, minlength=MILLION).max() == 1 == np.bincount(epoch, minlength=MILLION).min()
    # What two random permutations have in common: one place, and no trend.
    assert (first == second).sum() < 10
    for one, other in ((first, second), (first, np.arange(MILLION)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.005
    # Every stretch is an even sample of the whole: chi-square of 100 bins, standard deviation 14.
    for stretch in first.reshape(10, -1):
        counts = np.bincount(stretch // (MILLION // 100), minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 6 * 14
    assert order(123_456, 100).sample.tolist() == first[123_456:123_556].tolist()
    mixture = MixtureOrder([MILLION, MILLION // 2], [0.1, 0.5], seed=1)
    draws = mixture(0, mixture.epoch_size)
    assert np.bincount(draws.source).tolist() == [100_000, 250_000]
    assert all(len(np.unique(draws.sample[draws.source == s])) == mixture.shares[s] for s in (0, 1))
    stretch = np.bincount(draws.source[200_000:210_000]) / 10_000
    assert np.abs(stretch - [2 / 7, 5 / 7]).max() < 0.03


@pytest.mark.parametrize("group_by", ["none", "length_modality"])
def test_thirty_million_samples_hold_no_memory(group_by):
    tracemalloc.start()
    steps = batching(group_by, 30 * MILLION, 768, window=16)
    last = steps.steps(1) - 1
    seen = np.concatenate([steps.step(number).sample for number in (0, last // 2, last)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20 and len(np.unique(seen)) == 3 * 768 and seen.min() >= 0 and seen.max() < 30 * MILLION
    assert seen.max() > 29 * MILLION
