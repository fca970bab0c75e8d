"""`train.report` and `train.sweep_report` on run directories in their real formats, and evaluations on wandb."""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from common.errors import ConfigError, UserError
from common.files import write_json
from data_prep.store.split import Split
from tests.slurm import offline_wandb
from tests.train import world
from train import config as configuration
from train import demo, evaluate, report, sweep_report
from train.measure import plots, results, tracking
from train.measure.scoring import Accuracy
from train.measure.weight_space import WeightSpace
from train.process.run_dir import machine
from train.process.run_files import RunDir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared splits; a report needs no model."""
    folder = tmp_path_factory.mktemp("world")
    for name, count in (("train", 40), ("val", 6), ("test", 60)):
        world.write_split(folder / "data" / "squares" / name, world.samples(count))
    return folder


def make_run(data: Path, path: Path, *overrides: str, steps: int = 80, start: float = 9.0) -> Path:
    """A run directory as a run leaves it, without having trained."""
    path.mkdir(parents=True)
    words = [*world.overrides(data, path, "data.val=squares/val", "data.test=squares/test"), *overrides]
    config = configuration.resolve(configuration.compose_overrides(words))
    configuration.save(config, RunDir(path).config)
    record = {"id": "0123abcd", "name": path.name, "command": ["/code/train/__main__.py", *overrides]}
    write_json(RunDir(path).record, record | {"git_commit": "c0ffee", "git_dirty": False, "versions": {"torch": "2"}})
    parameters = {"total": 1000, "trained": 600, "connector": 600}
    facts = {"world_size": 2, "zero_stage": 3, "total_steps": steps, "vision_features_cached": False}
    write_json(RunDir(path).facts, facts | {"parameters": parameters, "identity": {"data": "d"}, "machine": machine()})
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 0.2 + start * 0.5**step, "samples": 8 * step, "samples_per_s": 10.0 + step % 5}
        line |= {"seconds": 1.0 * step, "lr/connector": 1e-3 * (1 - step / steps), "skipped_steps": 0}
        if step in (1, 50):
            line |= {"image_share": 0.9, "delta_ratio/mean": 0.2, "delta_ratio/0.q": 0.1, "delta_ratio/2.q": 0.3}
        lines.append(line)
    lines.append({"step": steps, "val_loss": 0.25})
    RunDir(path).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer(run: Path, images: str, wrong: dict[str, set[int]], capsys) -> None:
    """Write an evaluation by the command's own writer; `wrong`: of which samples a question is answered wrong."""
    config = configuration.read(RunDir(run).config)
    split = Split(Path(config.data.root) / "squares/test")
    records, ids = [], [sample.id for sample in split]
    for number, sample in enumerate(split):
        shown = {"real": sample.id, "none": ""}.get(images, ids[(number + 1) % len(ids)])
        for dialogue, talk in enumerate(sample.conversations):
            question, right = talk[0]["content"], talk[1]["content"]
            said = "purple" if number in wrong.get(question.split()[0], ()) else right
            record = {"sample": sample.id, "dialogue": dialogue, "question": question, "answer": right, "shown": shown}
            records.append(record | {"prediction": said, "reference": None})
    vectors = np.random.default_rng(0).normal(size=(len(ids[:9]), 5))
    space = WeightSpace(ids[:9], vectors @ vectors.T) if images == "real" else None
    evaluate._write(run, evaluate.Options(run=str(run), images=images), config, split, records, 2.0, space)
    assert "warning" not in capsys.readouterr().err


def write_report(monkeypatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.report", *words])
    assert report.main() == 0
    folder = next((word[4:] for word in words if word.startswith("out=")), None)
    return (Path(folder) / "report.md").read_text() if folder else ""


def test_a_report_of_two_stages_says_what_is_seen_and_what_not(data, tmp_path, monkeypatch, capsys):
    first = make_run(data, tmp_path / "runs/pretrain")
    second = make_run(data, tmp_path / "runs/finetune", "stage=finetune", f"init_from={first}")
    answer(second, "real", {"what": {3}, "is": set(range(8))}, capsys)
    answer(second, "shuffled", {"what": set(range(50)), "is": set(range(9))}, capsys)
    answer(second, "none", {"what": set(range(50)), "is": set(range(9))}, capsys)
    text = write_report(monkeypatch, f"run={first},{second}", f"out={tmp_path}/out")
    for name in ("accuracy", "losses", "deltas", "nearest", "confusion", "samples"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 10, name
        assert f"({name}.png)" in text
    rows: dict[str, str] = {}
    for line in text.splitlines():
        rows.setdefault(line.split(" | ")[0].strip("| "), line)
    assert "sees: " in rows["what color is the shape?"] and "does not see" not in rows["what color is the shape?"]
    assert "does not see yet: not above" in rows["is there a red shape?"]
    assert rows["seed"] == "| seed | 0 | 0 |" and "40 samples, 80 dialogues" in rows["data"]
    assert "600 trained of 1,000" in rows["parameters"] and machine() in rows["machine"]
    assert f"python -m train stage=finetune init_from={first}" in text and "git checkout c0ffee" in text
    assert "| words alone | rarer answers | follows the image |" in text
    assert re.search(r"\| \d+\.\d of \d+ \|", rows["what color is the shape?"])
    assert "| red | purple | 1 of 15 |" in text or "| black | purple | 1 of 15 |" in text
    assert "## Not in this report" not in text
    assert re.search(r"\| finetune, test \| 9 \| [345]\.\d \|", text)  # five directions at most


def test_a_run_that_was_not_evaluated_says_what_would_add_it(data, tmp_path, monkeypatch):
    run = make_run(data, tmp_path / "a run", "data.val=null", steps=1)
    RunDir(run).metrics.unlink()
    RunDir(run).evaluation.mkdir()
    write_json(RunDir(run).evaluation / "benchmarks.json", {"scores": {}, "results": []})  # of `train.benchmark`
    text = write_report(monkeypatch, f"run={run}", f"out={tmp_path}/out")
    missing = text.partition("## Not in this report")[2]
    assert f"python -m train.evaluate 'run={run}'" in missing and "images=shuffled" in missing
    assert "no step was made yet" in missing and "data.val=" in missing
    assert not list((tmp_path / "out").glob("*.png")) and "](" not in text
    write_report(monkeypatch, f"run={run}")
    assert (run / "report" / "report.md").read_text() == text


def test_an_imported_model_has_a_report_and_no_wandb_page(data, tmp_path, monkeypatch, capsys):
    run = make_run(data, tmp_path / "run", "tracking.wandb=offline")
    for file in (RunDir(run).record, RunDir(run).facts, RunDir(run).metrics):
        file.unlink()
    answer(run, "real", {}, capsys)
    assert not (run / "wandb").exists()
    text = write_report(monkeypatch, f"run={run}", f"out={tmp_path}/out")
    assert "| commit | not known |" in text and "No mistake." in text and "(samples.png)" in text


def test_the_demos_report_is_one_of_these_with_its_costs(data, tmp_path, capsys):
    runs = {"pretrain": make_run(data, tmp_path / "vlora/pretrain")}
    runs["finetune"] = make_run(data, tmp_path / "vlora/finetune", "stage=finetune", f"init_from={runs['pretrain']}")
    answer(runs["finetune"], "real", {"what": {3}}, capsys)
    scores = json.loads((runs["finetune"] / "evaluation/test-real.json").read_text())
    steps = demo.Steps(tmp_path / "steps.json")
    cost = {"seconds": 90.0, "core_seconds": 150.0, "peak_gb": 3.0}
    steps.costs = dict.fromkeys(("data", "pretrain vlora", "finetune vlora"), cost)
    results = {"vlora": {"runs": runs, "evaluation": {"test": {"real": scores}}}}
    assert demo._report(argparse.Namespace(data="easy_vqa"), steps, tmp_path, results, 300.0) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## What it sees" in text and "| pretrain vlora | 90 | 150 | 3.00 | 12.0 |" in text
    assert "All steps: 4.5 minutes" in text and (tmp_path / "step_time.png").exists()
    assert (
        json.loads((tmp_path / "summary.json").read_text())["connectors"]["vlora"]["stages"]["finetune"]["steps"] == 80
    )


@pytest.mark.parametrize("run", ["nowhere", "{run},", "{run},{run}"])
def test_what_is_no_run_is_refused_by_name(data, tmp_path, monkeypatch, run):
    made = make_run(data, tmp_path / "made")
    monkeypatch.setattr(sys, "argv", ["train.report", f"run={run.format(run=made)}"])
    with pytest.raises(ConfigError, match="no run directory|named twice"):
        report.main()
    assert not (made / "report").exists()


def test_a_damaged_evaluation_is_named(data, tmp_path, monkeypatch, capsys):
    run = make_run(data, tmp_path / "run")
    answer(run, "real", {}, capsys)
    (run / "evaluation/test-real.jsonl").write_text('{"sample": "squ')
    monkeypatch.setattr(sys, "argv", ["train.report", f"run={run}"])
    with pytest.raises(UserError, match=r"test-real.jsonl, line 1, is damaged.*evaluate the run again"):
        report.main()
    assert not (run / "report").exists()


def test_smoothing_lags_behind_nothing():
    line = [5.0 - 0.1 * step for step in range(36)]
    assert plots.smooth(line, 4) == pytest.approx(line)
    step = [1.0] * 18 + [0.0] * 18
    smooth = plots.smooth(step, 4)
    assert smooth[13] == 1.0 and smooth[22] == pytest.approx(0.0) and smooth[17] + smooth[18] == pytest.approx(1.0)
    assert plots.smooth([3.0], 4) == [3.0] and plots.smooth([], 4) == []


def test_first_steps_do_not_flatten_the_rest():
    figure, (high, even) = plots.plt.subplots(1, 2)
    plots.scale_losses(high, [9.9, 4.0, *[0.5 - 0.002 * n for n in range(85)]])
    plots.scale_losses(even, [1.2, 1.0, 0.8, 0.7])
    assert high.get_yscale() == "log" and "(log)" in high.get_ylabel()
    assert even.get_yscale() == "linear" and even.get_ylim() == (0, pytest.approx(1.26))
    plots.plt.close(figure)


@pytest.mark.parametrize(
    ("right", "controls", "said"),
    [
        (
            (82.1, 2000, 80.4, 83.7),
            {"blind floor": 81.8, "wrong image": 82.2},
            "does not see yet: not above wrong image",
        ),
        ((90.0, 2000, 88.6, 91.2), {"blind floor": 81.8, "wrong image": None}, "sees: 8.2 points above blind floor"),
        ((60.0, 10, 31.3, 83.2), {"blind floor": 40.0}, "not above blind floor, 40.0 (only 10 questions)"),
        ((60.0, 10, 31.3, 83.2), {"blind floor": None}, "not known"),
    ],
)
def test_reading(right, controls, said):
    known = {name: None if p is None else Accuracy(p, 1000, p - 1, p + 1) for name, p in controls.items()}
    assert said in results.reading(Accuracy(*right), known)


def test_accuracy_reaches_the_runs_own_wandb_page(data, tmp_path, capsys):
    run = make_run(data, tmp_path / "demo/vlora/finetune", "tracking.wandb=offline", f"output_root={tmp_path}")
    config = configuration.read(RunDir(run).config)
    tracker = tracking.Tracker(config, run, json.loads(RunDir(run).record.read_text()), 80, {})
    tracker.finish()
    (folder,) = run.glob("wandb/offline-run-*")  # named by the second: a real evaluation takes longer than one
    folder.rename(folder.with_name("offline-run-20200101_000000-0123abcd"))
    answer(run, "shuffled", {"what": set(range(30))}, capsys)
    wandb.teardown()  # its service writes the last records just behind `finish`; the end of a process waits for it
    start, scored = offline_wandb.read(run)
    assert {start.id, scored.id} == {"0123abcd"} and {start.group, scored.group} == {"demo/vlora"}
    assert {start.job_type, scored.job_type} == {"pretrain"}
    written = json.loads((run / "evaluation/test-shuffled.json").read_text())["accuracy"]
    (row,) = scored.rows
    assert row["step"] == 80 and row["accuracy/test-shuffled/overall"] == written["overall"]["percent"]
    assert row["accuracy/test-shuffled/what color is the shape?"] == 50.0
    assert tracking.names(config, run) == ("demo/vlora/finetune", "demo/vlora")
    config.tracking.name, config.tracking.group = "mine", "ours"
    assert tracking.names(config, run) == ("mine", "ours")
    config.tracking.name = config.tracking.group = None
    assert tracking.names(config, tmp_path / "alone") == ("alone", None)


def make_sweep(data: Path, folder: Path) -> Path:
    """Two ranks, two learning rates, one point twice with two seeds; the last has not begun."""
    points = [(4, "1e-4", 0), (4, "1e-4", 1), (4, "1e-3", 0), (16, "1e-4", 0), (16, "1e-3", 0)]
    lines = []
    for index, (rank, rate, seed) in enumerate(points):
        overrides = [f"generator.rank={rank}", f"optim.lr.connector={rate}", f"seed={seed}"]
        lines.append({"index": index, "overrides": overrides})
        if index < 4:
            make_run(data, folder / str(index), *overrides, start=4.0 + seed)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_sweeps_report_has_curves_accuracy_and_no_noise(data, tmp_path, monkeypatch, capsys):
    folder = make_sweep(data, tmp_path / "sweep")
    answer(folder / "0", "real", {"what": {1, 2}}, capsys)
    text = sweep_report.write(folder, sweep_report.collect(folder)).read_text()
    rows = list(csv.DictReader((folder / "points.csv").open()))
    assert rows[0]["val_loss"] == "0.25" and rows[0]["image_share"] == "0.9" and rows[0]["parameters"] == "600"
    assert float(rows[0]["accuracy"]) == pytest.approx(100 * 118 / 120) and rows[4]["loss"] == ""
    for name in ("curves", "loss", "val_loss", "accuracy"):
        assert (folder / f"{name}.png").stat().st_size > 1000 and f"({name}.png)" in text
    assert not (folder / "speed.png").exists() and "Speed is not drawn" in text
    metrics = folder / "3/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"samples_per_s": 1', '"samples_per_s": 3'))
    text = sweep_report.write(folder, sweep_report.collect(folder)).read_text()
    assert (folder / "speed.png").exists() and "32.0 (31.0–33.0)" in text
    monkeypatch.setattr(sys, "argv", ["train.report", f"run={folder}"])
    with pytest.raises(ConfigError, match="is a sweep: python -m train.sweep_report"):
        report.main()


def test_swept_values_are_in_order_of_size():
    assert sorted(["128", "16", "1e-3", "qkv", "qk"], key=sweep_report._order) == ["qk", "qkv", "1e-3", "16", "128"]


def test_configurations_name_what_they_are(data, tmp_path):
    run = results.load([make_run(data, tmp_path / "a/one"), make_run(data, tmp_path / "b/one")])
    assert [each.label for each in run] == ["a/one", "b/one"] and run[0].config.seed == asdict(run[1].config)["seed"]
