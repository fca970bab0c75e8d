"""The whole pipeline on real data with the tiny LLM: what `make demo` runs, smaller."""

import json
import os
import subprocess
import sys

import pytest

from common.files import read_json, write_json
from data_prep.store.manifest import MANIFEST
from model.generator.placement import placed_layers
from tests.train.world import ROOT
from train import config as configuration
from train import demo
from train.measure.tracking import read_metrics


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "train.demo", "--llm", "tiny", "--out", str(folder), "--questions", "500"]
    command += ["data.batch_size=32", "data.dialogues_per_sample=2"]  # two thirds of the work, and enough to see
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_it_learns_to_see(out):
    """Shape and color far above the blind floor; with a wrong image back at it."""
    summary = json.loads((out / "summary.json").read_text())
    evaluation = summary["connectors"]["vlora"]["evaluation"]
    real, wrong = evaluation["real"]["accuracy"], evaluation["shuffled"]["accuracy"]
    floor = summary["blind_floor"]
    # Measured: 98.4, 100.0 and 95.2; the margin is for other machines' rounding.
    assert real["shape"]["percent"] > 90 and real["color"]["percent"] > 85
    assert real["overall"]["percent"] > 85
    for kind in ("shape", "color"):
        assert wrong[kind]["low"] < floor[kind]["percent"] + 10
        assert wrong[kind]["percent"] < real[kind]["percent"] - 30


@pytest.mark.slow
def test_the_report_is_whole(out):
    summary = json.loads((out / "summary.json").read_text())
    for name in ("report.md", "losses.png", "accuracy.png", "samples.png", "step_time.png"):
        assert (out / name).stat().st_size > 500, name
    for stage in ("pretrain", "finetune"):
        figures = summary["connectors"]["vlora"]["stages"][stage]
        assert figures["world_size"] == 2 and figures["zero_stage"] == 3 and figures["skipped_steps"] == 0
        assert figures["samples_per_s"] > 0
        assert list((out / "vlora" / stage / "wandb").glob("offline-run-*/*.wandb"))
    assert summary["peak_gb"] > 0 and summary["git_commit"] and summary["versions"]["deepspeed"]
    losses = [r["loss"] for r in read_metrics(out / "vlora" / "finetune") if "loss" in r]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_precision_is_what_was_measured_faster_and_stays(tmp_path, capsys):
    chosen = demo.precision(tmp_path)
    measured = read_json(tmp_path / "precision.json", "")
    seconds = measured["product_seconds"]
    assert chosen == ("bf16" if seconds["bf16"] < 0.8 * seconds["fp32"] else "fp32")
    assert f"precision: {chosen}" in capsys.readouterr().out
    other = {"bf16": "fp32", "fp32": "bf16"}[chosen]  # a demo that is called again keeps to its first choice
    write_json(tmp_path / "precision.json", measured | {"chosen": other})
    assert demo.precision(tmp_path) == other
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("connector", ["vlora", "mlp"])
@pytest.mark.parametrize("data", list(demo.SUBJECTS))
def test_every_demo_trains_an_llm_by_a_recipe_for_it_on_the_data_it_names(data, connector, stage, tmp_path):
    for split in ("train", "val", "test", "caption_train", "caption_val"):  # `data.name` looks for no more
        (tmp_path / data / split).mkdir(parents=True)
        (tmp_path / data / split / MANIFEST).touch()
    found = {}
    for llm, layers in (("smollm2_135m", 30), ("tiny", 4)):
        words = demo.overrides(data, llm, connector, stage)
        words += [f"data.root={tmp_path}", *(["init_from=earlier"] if stage == "finetune" else [])]
        config = configuration.resolve(configuration.compose_overrides(words))
        splits = [source.path for source in config.data.train]
        assert all(path.startswith(f"{data}/") for path in [*splits, config.data.val, config.data.test]), (llm, splits)
        assert not config.stage.freeze, "patterns for the layers of one LLM and the deltas of one preset"
        assert config.stage.freeze_lower == (llm != "tiny" and stage == "finetune")
        assert placed_layers(config.generator, layers)
        found[llm] = config
    assert found["tiny"].stage.steps != found["smollm2_135m"].stage.steps
    assert found["tiny"].llm.path.endswith("tiny-llama" + ("" if data == "easy_vqa" else f"-{data}"))
