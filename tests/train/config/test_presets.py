"""Every preset of every group means what its file says, whatever stands beside it; recipes hold no sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from train.config import RunConfig, resolve
from train.config.presets import CONF

PARTS = ("llm", "vision", "generator", "connector", "engine", "launch", "stage", "tracking")
LLMS = [file.stem for file in sorted((CONF / "llm").glob("*.yaml"))]
RECIPES = [str(file.relative_to(CONF / "recipe").with_suffix("")) for file in sorted((CONF / "recipe").rglob("*.yaml"))]
# Of the parts, a recipe names only how it shows its images, where the encoder's file does not say so itself, and how
# its batch is cut.
OF_A_RECIPE = {"data", "stage", "optim", "checkpoint", "tracking", "evaluation"}
OF_A_RECIPE |= {"vision.image_mode", "engine.micro_batch_size"}


def tree(*overrides: str, conf: Path = CONF) -> DictConfig:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", list(overrides))


def own(group: str, name: str) -> DictConfig:
    file = OmegaConf.load(CONF / group / f"{name}.yaml")
    for key in ("defaults", "hydra"):
        file.pop(key, None)
    return file


def holds(composed: DictConfig, said: DictConfig) -> bool:
    """Whether saying it once more changes nothing."""
    again = OmegaConf.merge(composed, said)
    return OmegaConf.to_container(again, resolve=True) == OmegaConf.to_container(composed, resolve=True)


@pytest.mark.parametrize("group", PARTS)
def test_a_preset_that_is_named_holds_in_full(group: str) -> None:
    for number, file in enumerate(sorted((CONF / group).glob("*.yaml"))):
        beside = {"llm": LLMS[number % len(LLMS)], "stage": ("finetune", "pretrain")[number % 2]} | {group: file.stem}
        composed = tree(*(f"{key}={value}" for key, value in beside.items()))
        assert holds(composed, OmegaConf.create({group: own(group, file.stem)})), f"{group}={file.stem} {beside}"


def test_the_papers_generator_is_the_papers_with_any_llm() -> None:
    for llm in LLMS:
        sizes = resolve(tree("generator=paper", f"llm={llm}")).generator
        assert (sizes.num_blocks, sizes.width, sizes.num_heads, sizes.rank, sizes.every) == (8, 512, 16, 64, 4)
        assert (sizes.types, sizes.shared, sizes.init, sizes.image_norm) == ("qkvom", False, "paper", False)


def test_a_preset_of_the_engine_is_not_overridden_by_a_recipe() -> None:
    expected = tree("engine=a100", "llm=vicuna_7b", "engine.micro_batch_size=null").engine
    assert all(tree("engine=a100", f"llm={llm}").engine == expected for llm in ("smollm2_135m", "tiny"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_data_steps_and_rates(recipe: str) -> None:
    said = own("recipe", recipe)
    for key in said:
        if key not in OF_A_RECIPE:
            assert {f"{key}.{name}" for name in said[key]} <= OF_A_RECIPE, f"{recipe}: {key}"
    said.pop("vision", None)
    assert holds(tree(f"recipe={recipe}"), said)


def test_files_say_only_what_differs_from_the_dataclasses() -> None:
    """The key that a group is chosen for (`connector.name`) apart."""
    defaults = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    identity = {"connector": {"name"}, "stage": {"name", "train"}, "tracking": {"wandb"}, "launch": {"mode", "workers"}}
    identity |= {"generator": {"init"}}
    for group in PARTS:
        for file in sorted((CONF / group).glob("*.yaml")):
            for key, value in OmegaConf.to_container(own(group, file.stem)).items():
                if key not in identity.get(group, ()):
                    assert value != defaults[group][key], f"{group}/{file.stem}.yaml repeats {key}={value}"


def test_an_llm_without_a_recipe_of_its_own_takes_the_general_one(tmp_path: Path, monkeypatch) -> None:
    """One new file, conf/llm/NAME.yaml, is enough."""
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    monkeypatch.setattr("train.config.presets.CONF", conf)
    (conf / "llm" / "mine.yaml").write_text("path: /models/mine\n")
    config = resolve(tree("llm=mine", conf=conf))
    assert config.llm.path == "/models/mine" and config.optim.lr.connector == 5e-4
    assert config.generator.image_norm and config.generator.num_blocks == 8
    config = resolve(tree("llm=mine", "stage=finetune", "init_from=x", conf=conf))
    assert config.optim.lr.llm == 2e-5 and config.data.train[0].path == "easy_vqa/train"


def test_a_recipe_of_a_connector_goes_before_that_of_the_llm(tmp_path: Path, monkeypatch) -> None:
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    monkeypatch.setattr("train.config.presets.CONF", conf)
    recipe = "# @package _global_\ndefaults:\n  - /recipe/tiny/pretrain\n  - _self_\noptim:\n  lr: {connector: 0.25}\n"
    (conf / "recipe" / "tiny" / "pretrain_mlp.yaml").write_text(recipe)
    assert resolve(tree("llm=tiny", "connector=mlp", conf=conf)).optim.lr.connector == 0.25
    assert resolve(tree("llm=tiny", "connector=mlp", conf=conf)).stage.steps == 40
    assert resolve(tree("llm=tiny", conf=conf)).optim.lr.connector == 1.5e-4


def test_the_built_in_encoders_image_size_stays_with_it() -> None:
    assert resolve(tree()).vision.image_size == 56
    assert resolve(tree("vision.path=/models/other")).vision.image_size is None
    assert resolve(tree("vision.path=/models/other", "vision.image_size=112")).vision.image_size == 112


def test_an_llm_at_another_path_takes_no_list_of_layers_along() -> None:
    generator = resolve(tree("llm.path=/models/other")).generator
    assert generator.layers is None and generator.every == 4


def test_no_preset_lists_layers() -> None:
    """An LLM of another depth takes a preset along."""
    for file in sorted((CONF / "generator").glob("*.yaml")):
        assert resolve(tree(f"generator={file.stem}")).generator.layers is None
