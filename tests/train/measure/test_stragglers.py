"""Which rank is named as slow, on made-up figures of four ranks; and that the probe measures."""

from __future__ import annotations

import pytest
import torch

from train.measure import stragglers
from train.measure.stragglers import Stragglers, probe


@pytest.fixture
def ranks(monkeypatch):
    """Four ranks; `figures` are what they measured: seconds of data and of arithmetic of each."""
    figures = {}
    monkeypatch.setattr(stragglers.distributed, "world_size", lambda: 4)
    monkeypatch.setattr(
        stragglers.distributed,
        "gather",
        lambda own: [(f"n{r // 2}", figures["data"][r], figures["compute"][r], 1.0) for r in range(4)],
    )
    return figures


def told(ranks, data, compute, times=5):
    ranks |= {"data": data, "compute": compute}
    watch = Stragglers(torch.device("cpu"))
    return [message for _ in range(times) for message in watch.compare()[1]]


def test_the_rank_that_waits_for_its_data_is_named_once(ranks):
    (message,) = told(ranks, [0.01, 0.01, 0.4, 0.02], [1e-3] * 4)
    assert message.startswith("rank 2 (n1) holds up the others: it waits 0.400 s a step for its data, the median")


def test_the_rank_whose_arithmetic_is_slow_is_named_once(ranks):
    (message,) = told(ranks, [0.01] * 4, [1e-3, 1e-3, 1.1e-3, 1.8e-3])
    assert message.startswith("rank 3 (n1) holds up the others: its arithmetic takes 1.8 times as long")


@pytest.mark.parametrize(
    ("data", "compute"),
    [
        ([0.01, 0.01, 0.04, 0.01], [1e-3] * 4),  # four times the others, and nothing of a step
        ([0.4] * 4, [1e-3] * 4),  # all alike
        ([0.01] * 4, [1e-3, 1e-3, 1e-3, 1.4e-3]),
    ],
)
def test_no_rank_is_named_without_need(ranks, data, compute):
    assert told(ranks, data, compute) == []


def test_one_hiccup_is_no_straggler(ranks):
    watch = Stragglers(torch.device("cpu"))
    for turn in range(8):  # never the same one three times in a row
        ranks |= {"data": [0.9 if r == turn // 2 % 4 else 0.01 for r in range(4)], "compute": [1e-3] * 4}
        figures, messages = watch.compare()
        assert messages == [] and figures["slowest/data_rank"] == turn // 2 % 4


def test_alone_there_is_nobody_to_compare_with():
    watch = Stragglers(torch.device("cpu"))
    watch.step(0.1, 1.0)
    assert watch.compare() == ({}, []) and 0 < probe(torch.device("cpu")) < 1
