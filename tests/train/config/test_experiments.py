"""Every experiment composes in both stages and builds on meta; the paper's systems have their own recipes."""

import pytest
import torch

from model.vlm import build_model
from train.config import RunConfig, compose_overrides, resolve
from train.config.presets import CONF
from train.measure.summary import parameter_counts

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def composed(experiment: str, stage: str = "pretrain", *more: str) -> RunConfig:
    init = ["init_from=before"] if stage == "finetune" else []
    return resolve(compose_overrides([f"experiment={experiment}", f"stage={stage}", *init, *more]))


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("vlora_")])
def test_an_experiment_builds_without_its_weights(experiment):
    first, second = composed(experiment), composed(experiment, "finetune")
    for stage in (first, second):
        assert stage.data.num_workers > 0 and stage.engine.zero_stage == 3 and stage.engine.precision == "bf16"
    assert first.model == second.model or first.vision.image_mode != second.vision.image_mode
    assert (first.data.group_by, second.data.group_by) == ("none", "length_modality")
    counts = parameter_counts(build_model(first.model, torch.bfloat16, meta=True))
    assert counts["llm"] > 1.5e9 and counts["vision"] > 2.5e8


# Connector, samples per step and peak rate of stage 1, its source, parameters: paper and LLaVA-v1.5's scripts.
SYSTEMS = {
    "vlora_7b": ("vlora", 768, 5e-5, "capsfusion/train", 7_893_814_784),
    "llava_v15_7b": ("mlp", 256, 1e-3, "llava_pretrain/train", 7_062_902_784),
    "llava_v15_7b_capsfusion": ("mlp", 256, 1e-3, "capsfusion/train", None),
    "llava_qformer_7b": ("qformer", 256, 1e-4, "capsfusion/train", None),
}


@pytest.mark.parametrize("experiment", SYSTEMS)
def test_the_papers_systems_have_their_recipes(experiment):
    connector, batch, rate, source, total = SYSTEMS[experiment]
    first, second = composed(experiment), composed(experiment, "finetune")
    assert first.connector.name == second.connector.name == connector
    assert (first.data.batch_size, first.optim.lr.connector) == (batch, rate)
    assert [s.path for s in first.data.train] == [source] and first.data.template == "plain"
    assert (second.data.batch_size, second.optim.lr.connector) == (128, 2e-5)
    assert [s.path for s in second.data.train] == ["llava_mix665k/train"] and second.data.template == "vicuna_v1"
    assert second.data.group_window == 128 and first.optim.grad_clip == second.optim.grad_clip == 0
    assert (first.vision.image_mode, second.vision.image_mode) == ("crop", "pad")
    model = build_model(first.model, torch.bfloat16, meta=True)
    assert total in (None, parameter_counts(model)["total"])
    assert model.connector.visual_tokens == {"vlora": 0, "mlp": 576, "qformer": 128}[connector]


def test_another_connector_brings_its_own_rate_batch_and_data():
    assert composed("vlora_7b", "pretrain", "connector=mlp") == composed("llava_v15_7b")
    assert composed("vlora_7b", "finetune", "connector=mlp") == composed("llava_v15_7b", "finetune")
    own = composed("vlora_7b", "pretrain", "connector=mlp", "optim.lr.connector=2e-3")
    assert own.optim.lr.connector == 2e-3 and own.data.batch_size == 256  # what is typed wins


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("ablation")])
def test_an_ablation_is_the_papers_run_but_for_one_key(experiment):
    for stage in ("pretrain", "finetune"):
        assert composed(experiment, stage) == composed("vlora_7b", stage)
