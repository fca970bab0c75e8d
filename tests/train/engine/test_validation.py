"""Validation during a run: training as without it, the best step kept and exported, in every lifetime the same."""

from __future__ import annotations

import os
import signal

from safetensors.torch import load_file

from common.files import read_json, write_json
from tests.train import world
from train.engine.saving import _prune
from train.measure.tracking import read_metrics


def weights(run):
    return load_file(run / "export/model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def losses(run):
    return [(r["step"], r["loss"]) for r in read_metrics(run) if "loss" in r]


def test_the_best_step_is_kept_and_exported_and_training_does_not_change(tmp_path):
    """Stopped once and resumed. The other run is not validated."""
    home, run, other = world.make(tmp_path / "world"), tmp_path / "run", tmp_path / "other"
    constant = ("launch.workers=1", "optim.schedule=constant", "optim.warmup_ratio=0")

    def train(folder, *more):
        done = world.train(world.overrides(home, folder, *constant, *more))
        assert done.returncode == 0, done.stderr
        return done

    validated = ("data.val=squares/val", "tracking.num_samples=2", "checkpoint.keep=1", "evaluation.every=2")
    arguments = [*validated, "stage.steps=6"]
    process = world.start(world.overrides(home, run, *constant, *arguments))
    world.wait_for(lambda: world.steps_done(run) >= 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(300)
    train(run, *arguments)
    found = {r["step"]: r["val_loss"] for r in read_metrics(run) if "val_loss" in r}
    assert list(found) == [2, 4, 6]
    best = min(found, key=found.get)
    assert read_json(run / "facts.json", "")["best"] == {"step": best, "val_loss": found[best]}
    # The end is validated when its checkpoint is there.
    before = min((2, 4), key=found.get)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == [f"step-{before:06d}", "step-000006"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"step-{step:06d}.jsonl" for step in found]

    train(other, f"stage.steps={before}")
    earlier = weights(other)
    train(other, "stage.steps=6")
    assert losses(run) == losses(other) and same(weights(run), weights(other))

    # As if no later step had been better: the export of the finished run is made anew.
    record = read_json(run / "checkpoints/step-000006" / "COMPLETE", "")
    assert record["progress"]["best_step"] == before
    record["progress"]["best_loss"] = 0.0
    write_json(run / "checkpoints/step-000006" / "COMPLETE", record)
    done = train(run, *arguments, "checkpoint.export=best")
    assert "resumed at step 6" in done.stdout
    assert same(weights(run), earlier) and not same(earlier, weights(other))
    assert f"| weights | of step {before}" in (run / "export/README.md").read_text()


def test_the_best_checkpoint_is_never_pruned(tmp_path):
    for step in (5, 999_995, 1_000_000, 1_000_005):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        write_json(folder / "COMPLETE", {})
    _prune(tmp_path, 2, "step-000005")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-1000000", "step-1000005"]
    _prune(tmp_path, 1, "step-1000005")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1000005"]
