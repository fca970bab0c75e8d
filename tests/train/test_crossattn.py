"""The fourth connector through the whole product: two ranks, ZeRO-3, packed and recomputed, both stages, evaluation."""

import json

import pytest
from safetensors.torch import load_file

from tests.train import world
from train.measure.tracking import read_metrics


@pytest.mark.slow
def test_crossattn_trains_both_stages_and_answers(tmp_path):
    home, runs = world.make(tmp_path / "world"), [tmp_path / "first", tmp_path / "second"]
    short = ["connector=crossattn", "stage.steps=8", "llm.pack_tokens=64", "engine.gradient_checkpointing=true"]
    stages = ([], ["stage=finetune", f"init_from={runs[0]}"])
    for run, stage in zip(runs, stages, strict=True):
        done = world.train(world.overrides(home, run, *short, *stage))
        assert done.returncode == 0, done.stderr
        losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
        assert len(losses) == 8 and min(losses[4:]) < losses[0]
        weights = load_file(run / "export/model.safetensors")
        gates = [tensor.item() for name, tensor in weights.items() if name.endswith(".gate")]
        assert len(gates) == 4 and all(gates)  # they start at zero
    assert "gated cross-attention of 4 heads in front of layers 0, 1, 2, 3" in done.stdout
    done = world.train([f"run={runs[1]}", "split=squares/val"], module="train.evaluate")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (runs[1] / "evaluation/squares-val-real.jsonl").read_text().splitlines()]
    assert len(answers) == 12 and all("prediction" in answer for answer in answers)
