"""A loss that rises is told, one that only trembles is not; a run that comes apart says so."""

import math
import re
from random import Random

import pytest

from tests.train import world
from train.engine.divergence import RisingLoss


def told(losses, capsys, limit=0.3):
    observer = RisingLoss(limit)
    for step, loss in enumerate(losses, 1):
        observer(step, {"loss": loss})
    return re.findall(
        r"warning: step (\d+): the loss .*? is (\S+), and was (\S+) at step (\d+)", capsys.readouterr().err
    )


def falling(steps, noise=0.2):
    random = Random(0)
    return [0.5 + 10 * math.exp(-step / 5) + random.uniform(-noise, noise) for step in range(steps)]


def test_a_loss_that_falls_and_trembles_is_not_told(capsys):
    assert told(falling(300), capsys) == []
    assert told([3.0, 0.5, 9.0, 0.5], capsys) == []  # too few for a mean


def test_one_bad_batch_is_not_told_and_a_rise_is_told_once(capsys):
    assert told([*falling(60, 0), 3.4, *[0.5] * 40], capsys) == []
    rising = [*falling(60, 0), *[2.5] * 40]
    assert told(rising, capsys) == [("62", "0.90", "0.50", "60")]


def test_a_second_rise_is_told_again(capsys):
    losses = [*falling(60, 0), *[2.5] * 20, *[0.5] * 20, *[2.5] * 20]
    assert [step for step, *_ in told(losses, capsys)] == ["62", "102"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_has_risen(loss, capsys):
    assert len(told([*falling(30, 0), *[loss] * 20], capsys)) == 1


def test_a_run_at_a_wild_rate_warns_and_one_at_a_sane_rate_does_not(tmp_path):
    home = world.make(tmp_path / "world")

    def errors(name, *more):
        done = world.train(world.overrides(home, tmp_path / name, "launch.workers=1", *more))
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "the run may be coming apart" not in errors("sane", "stage.steps=20")
    finetuning = ("stage=finetune", f"init_from={tmp_path / 'sane'}", "stage.steps=40", "optim.lr.llm=1.0")
    assert errors("wild", *finetuning).count("the run may be coming apart") == 1
