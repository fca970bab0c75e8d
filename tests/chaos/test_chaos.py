"""The short form of `make chaos`: a few chosen kills, and a part of the damage matrix that another seed replaces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import damage, inputs, kills
from tests.chaos.points import Plan
from tests.train import world

pytestmark = pytest.mark.slow


def test_killed_twice_a_run_ends_bit_for_bit_as_if_undisturbed(tmp_path: Path) -> None:
    """In the middle of writing a checkpoint, then (resumed) in the evaluation after its last step."""
    home = world.make(tmp_path / "world")
    plans: list[Plan | float] = [Plan("checkpoint write", 3, delay=0.002, victim="all"), Plan("validation", rank=1)]
    outcome = kills.kill_run(home, tmp_path / "run", "pretrain", plans)
    assert outcome.landed == 2 and outcome.problems == [], outcome


def test_killed_data_preparation_ends_as_if_undisturbed(tmp_path: Path) -> None:
    plans = [Plan("add", 100, rank=None, victim="all"), Plan("rename", 4, rank=None, victim="all")]
    outcome = kills.kill_preparation(tmp_path, plans)
    assert outcome.landed == 2 and outcome.problems == [], outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, as a finished run is made in it."""
    return tmp_path_factory.mktemp("bench")


def test_damage_is_refused_by_name_repaired_or_harmless(folder: Path) -> None:
    bench = damage.Bench(folder)
    cases = [case for case in bench.cases() if case.action in ("evaluate", "report", "prepare")]
    results = [bench.run(case) for case in random.Random(0).sample(cases, 8)]
    assert [result for result in results if result.how not in damage.GOOD] == []


def test_bad_input_is_one_line_or_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    bench = inputs.Inputs(folder)
    results = [bench.run(number, seed=0) for number in range(6)]
    assert [result for result in results if result.how not in inputs.GOOD] == []
