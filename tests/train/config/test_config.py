"""Every YAML of conf/ composes and validates; errors name key, nearest key and remedy."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from data_prep.store.writer import write_split
from model.decoder.norms import require_nvidia_apex
from tests.train import world
from train import config as configuration
from train.config import ConfigError, RunConfig, accumulation, compose_overrides, explain, resolve
from train.data.config import SourceConfig
from train.process.inputs import require
from train.process.run_dir import create

CONF = str(Path(__file__).resolve().parents[3] / "conf")


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        try:
            tree = compose("config", list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error) from error
    return resolve(tree)


@pytest.mark.parametrize("llm", ["smollm2_135m", "tiny", "vicuna_7b"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("connector", ["vlora", "mlp", "qformer", "crossattn"])
def test_every_choice_composes(llm, stage, connector):
    init = ["init_from=somewhere"] if stage == "finetune" else []
    config = composed(f"llm={llm}", f"stage={stage}", f"connector={connector}", *init)
    assert config.stage.name == stage and config.connector.name == connector
    assert config.stage.train.llm == (stage == "finetune")


def test_a_saved_configuration_loads_as_it_was(tmp_path):
    config = composed()
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.rnak=4", r"unknown configuration key `generator\.rnak`; did you mean `generator\.rank`\?"),
        ("+generator.rnak=4", r"unknown configuration key `generator\.rnak`; did you mean `generator\.rank`\?"),
        ("+sede=1", r"unknown configuration key `sede`; did you mean `seed`\?"),
        ("generator.rank=many", r"`generator\.rank`.*many"),
        ("engine.precision=fp16", r"engine\.precision=fp16: choose one of fp32, bf16"),
        ("connector=magic", r"magic"),
        ("connector.name=vlra", r"did you mean vlora\?"),
        ("generator.types=qx", r"unknown type 'x'; known: q, k, v"),
        ("ops.backend=hybird", r"ops\.backend=hybird: choose one of auto, reference, .*did you mean hybrid\?"),
        ("generator.rank=0", r"generator\.rank=0: must be at least 1"),
        ("stage.epochs=1", r"give one of the two"),
        ("optim.betas=[0.9]", r"give two numbers"),
        ("optim.warmup_ratio=1.5", r"optim\.warmup_ratio=1\.5"),
        ("engine.micro_batch_size=7", r"engine\.micro_batch_size=7 does not divide data\.batch_size"),
        ("engine.offload_optimizer=true", r"needs optim\.name=deepspeed_cpu_adam"),
        ("stage=finetune", r"stage=finetune needs init_from="),
        ("stage.train.llm=lora", r"lora adapts the LLM in finetuning, but stage=pretrain keeps it frozen"),
        ("stage.train.llm=yes", r"stage\.train\.llm=yes: choose one of false, true, lora"),
        ("stage.lora.rank=4", r"stage\.lora is given, but stage\.train\.llm=false makes no adapters"),
        ("stage.lora.types=qm", r"stage\.lora\.types=qm: m is no projection"),
        ("stage.lora.types=x", r"stage\.lora\.types=x: unknown type"),
        ("stage.train.vision=true", r"vision\.cache=true reads features of a frozen encoder"),
        ("llm.kernels=ligre", r"llm\.kernels=ligre: choose one of auto, .*did you mean liger\?"),
        ("llm.attn_implementation=sdp", r"choose one of eager, sdpa, flash_attention_2; did you mean sdpa\?"),
        ("llm.attn_implementation=flash_attention_2", r"needs engine\.precision=bf16"),
        ("engine.gradient_checkpointing=maybe", r"gradient_checkpointing=maybe: choose one of true, false, auto"),
        ("engine.gradient_checkpointing=1", r"gradient_checkpointing=1: choose one of true, false, auto"),
        ("engine.memory_gib=0", r"engine\.memory_gib=0.*above 0"),
        ("data.val=null evaluation.every=100", r"evaluation\.every=100 needs data\.val"),
        ("data.val=null checkpoint.export=best", r"checkpoint\.export=best needs data\.val"),
        ("engine.compile=inductor", r"engine\.compile=inductor needs engine\.zero_stage=2 or less"),
        ("engine.zero_stage=auto", r"`engine\.zero_stage`.*auto"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        composed(*override.split())
    assert "\n" not in str(caught.value)


def test_bf16_needs_sharded_optimizer_state():
    with pytest.raises(ConfigError, match=r"engine\.precision=bf16 .*engine\.zero_stage=1"):
        composed("engine.precision=bf16", "engine.zero_stage=0")
    assert composed("engine.precision=bf16", "engine.zero_stage=1").engine.zero_stage == 1


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_without_its_package_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"flash_attn is not installed.*llm\.attn_implementation=sdpa"):
        composed("llm.attn_implementation=flash_attention_2", "engine.precision=bf16")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger_kernel is installed")
def test_kernels_without_their_package_are_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match=r"llm\.kernels=liger: .*not installed.*llm\.kernels=auto"):
        composed("llm.kernels=liger")


def test_batch_must_divide_among_ranks_and_micro_batches():
    config = composed("data.batch_size=24", "engine.micro_batch_size=6")
    assert accumulation(config, 2) == 2
    assert accumulation(config, 4) == accumulation(config, 8) == 1  # a share of 3 is below the most
    with pytest.raises(ConfigError, match="do not divide among 5 ranks"):
        accumulation(config, 5)
    with pytest.raises(ConfigError, match="8 samples each, which engine.micro_batch_size=6"):
        accumulation(config, 3)


def test_the_unrelated_apex_of_pypi_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UserError, match="apex is not installed"):
        require_nvidia_apex("optim.name=apex_fused_adam", "optim.name=adamw")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    with pytest.raises(UserError, match="an unrelated one from PyPI.*pip uninstall apex"):
        require_nvidia_apex("optim.name=apex_fused_adam", "optim.name=adamw")


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("tracking.name=20240101_120000", "tracking.name", "20240101_120000"),
        ("run_dir=0777", "run_dir", "0777"),
        ("run_dir=1e3", "run_dir", "1e3"),
        ("tracking.name=true", "tracking.name", "true"),
        ("tracking.tags=[0777,1e3]", "tracking.tags", ["0777", "1e3"]),
        ("llm.path=/models/a=b", "llm.path", "/models/a=b"),
        ("llm.path=/modèles/x(1),#2", "llm.path", "/modèles/x(1),#2"),
        ("llm.path=/it's", "llm.path", "/it's"),
        ("llm.path='/in quotes'", "llm.path", "/in quotes"),
        ("llm.path=~/x", "llm.path", "/home/me/x"),
        ("cache_dir=~/c", "data.root", "/home/me/c/data"),
        ("data.train=[a=b/train,0777]", "data.train", [SourceConfig("a=b/train"), SourceConfig("0777")]),
        ("data.val=null", "data.val", None),
        ("generator.types=q,k,gate", "generator.types", "q,k,gate"),
    ],
)
def test_typed_values_are_the_values_used(word, key, value, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    config = resolve(compose_overrides([word]))
    configuration.save(config, tmp_path / "config.yaml")
    for found in (config, configuration.read(tmp_path / "config.yaml")):
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.train=[{path: a=b}]", r"data\.train=\[\{path: a=b\}\] cannot be read; quote text in it"),
        ("optim.betas={a: 1}", r"optim\.betas"),
        ("optim.lr.llm=fast", r"`optim\.lr\.llm`.*fast"),
        ("data.train=[{path: a, wieght: 1}]", r"wieght"),
        ("seed=", r"seed"),
        ("seed=1,2", r"seed=1,2: several values are a sweep, which wants -m"),
        ("connector=mlq", r"connector=mlq: no such preset; there are .*mlp.*; did you mean mlp\?"),
    ],
)
def test_what_hydra_cannot_read_is_one_line(word, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(compose_overrides([word]))
    assert "\n" not in str(caught.value)


def test_a_start_that_trained_nothing_does_not_block_its_directory(tmp_path):
    def start(rank):
        config = resolve(compose_overrides([f"run_dir={tmp_path}/run", f"generator.rank={rank}"]))
        return create(config), configuration.read(tmp_path / "run" / "config.yaml").generator.rank

    assert start(4)[1] == 4
    assert start(8)[1] == 8  # corrected
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="holds a run with generator.rank=8, now it is 4"):
        start(4)


def test_missing_inputs_are_named_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("train.process.inputs.missing_models", lambda config: [])
    monkeypatch.setattr("train.process.inputs.load_preprocessor", lambda vision: None)
    root = f"data.root={tmp_path}"
    for check in ("check=true", "check=false"):
        with pytest.raises(ConfigError, match=r"data\.train\[0\]\.path=.*no prepared split in .*data_prep"):
            require(resolve(compose_overrides([root, check])))
    write_split(tmp_path / "a", world.samples(2))
    with pytest.raises(ConfigError, match=r"data\.val=b: no prepared split.*or set data\.val=null"):
        require(resolve(compose_overrides([root, "data.train=a", "data.val=b"])))
    with pytest.raises(ConfigError, match=r"data\.test=easy_vqa/test: .*or set data\.test=null"):
        require(resolve(compose_overrides([root, "data.train=a", "data.val=null"])))
    (tmp_path / "cut").mkdir()
    with pytest.raises(
        ConfigError, match=r"data\.val=cut: .*/cut has no manifest\.json; make it .*or set data\.val=null"
    ):
        require(resolve(compose_overrides([root, "data.train=a", "data.val=cut"])))
    mine = [root, "data.train=a", "data.val=null", "data.test=null"]
    assert require(resolve(compose_overrides(mine))) == []
    tuned = [*mine, "stage=finetune", f"init_from={tmp_path}/run"]
    with pytest.raises(ConfigError, match=r"init_from=.*has no finished export"):
        require(resolve(compose_overrides(tuned)))
    # Planned for another machine, or prepared for a job that comes after the data: said, not refused.
    planned = [root, "check=true", "data.expected_length=64"]
    assert len(require(resolve(compose_overrides(planned)))) == 3
    with pytest.raises(ConfigError, match="no prepared split"):
        require(resolve(compose_overrides([root, "data.expected_length=64"])))
    assert len(require(resolve(compose_overrides([root, "launch=slurm"])))) == 3


@pytest.mark.parametrize("word", ["generator.every=2", "generator.above=0.25"])
def test_what_listed_layers_would_pass_over_is_refused(word):
    """A list decides: `every` and `above` beside it would change nothing."""
    message = rf"{re.escape(word)} is given, and generator\.layers=\[1, 3\].*add generator\.layers=null"
    with pytest.raises(ConfigError, match=message):
        compose_overrides(["generator.layers=[1,3]", word])
    key, value = word.removeprefix("generator.").split("=")
    for own in ([], ["generator.layers=null"], ["llm=tiny"]):
        sizes = resolve(compose_overrides([word, *own])).generator
        assert (getattr(sizes, key), sizes.layers) == (float(value), None)
    assert resolve(compose_overrides(["llm=tiny", "generator.layers=[1,3]"])).generator.layers == [1, 3]
    listed = resolve(
        compose_overrides(["generator.layers=[1,3]", "generator.every=null", "generator.above=0"])
    ).generator
    assert listed.layers == [1, 3]
