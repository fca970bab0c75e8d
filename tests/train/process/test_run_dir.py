"""The run directory: made, entered again, moved, made longer, damaged."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import read_json
from tests.train import world
from train import config as configuration
from train.config import MovedTo, RunConfig
from train.data import SourceConfig
from train.process import run_dir


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config(home: Path, tmp_path: Path) -> RunConfig:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.llm.path, config.vision.path, config.data.root = f"{home}/llm", f"{home}/vision", f"{home}/data"
    config.data.train = [SourceConfig("squares/train")]
    config.stage.steps, config.stage.epochs = 10, None
    return config


def begun(config: RunConfig) -> Path:
    """A run that has done a step: until then another configuration makes the directory anew."""
    run = run_dir.create(config)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def again(config: RunConfig, **changes: object) -> Path:
    """Enter the run directory with some keys changed."""
    new = copy.deepcopy(config)
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(new, group), name, value)
    return run_dir.create(new)


def test_a_run_holds_absolute_paths(home: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    config.llm.path, config.vision.path, config.data.root, config.cache_dir = "./llm", "vision", "data", "cache"
    saved = configuration.load(run_dir.create(config) / "config.yaml")
    assert saved.llm.path == f"{home}/llm" and saved.vision.path == f"{home}/vision"
    assert saved.data.root == f"{home}/data" and saved.cache_dir == f"{home}/cache"


def test_a_moved_model_is_known_by_its_fingerprint(home: Path, config: RunConfig, tmp_path: Path) -> None:
    run = run_dir.create(config)
    shutil.copytree(home / "llm", tmp_path / "moved")
    again(config, llm__path=str(tmp_path / "moved"))
    assert configuration.load(run / "config.yaml").llm.path == str(tmp_path / "moved")
    other = world.make(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"llm\.path=.*other/llm is another model \(fingerprint .*moved to"):
        again(config, llm__path=f"{other}/llm")
    moved = configuration.load(run / "config.yaml", MovedTo(f"{home}/llm"), MovedTo())
    assert moved.llm.path == f"{home}/llm" and moved.vision.path == f"{home}/vision"


def test_how_a_run_is_executed_may_change_and_what_it_computes_may_not(config: RunConfig) -> None:
    begun(config)
    again(config, engine__micro_batch_size=2, engine__timeout_minutes=3.0)
    with pytest.raises(UserError, match=r"holds a run with engine\.precision=bf16, now it is fp32"):
        again(config, engine__precision="fp32")


def test_a_run_becomes_longer_where_the_schedule_allows(config: RunConfig) -> None:
    config.optim.schedule, config.optim.warmup_ratio = "constant", 0.0
    run = begun(config)
    (run / "DONE").touch()
    again(config)
    assert (run / "DONE").exists()
    again(config, stage__steps=20)
    assert not (run / "DONE").exists()
    with pytest.raises(UserError, match="can only become longer"):
        again(config, stage__steps=5)
    again(config, stage__steps=20)  # what it is now


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0.0), ("constant", 0.5)])
def test_a_longer_run_with_other_learning_rates_is_refused(config: RunConfig, schedule: str, warmup: float) -> None:
    why = "optim.schedule=cosine" if schedule == "cosine" else "warmup_ratio=0.5"
    config.optim.schedule, config.optim.warmup_ratio = schedule, warmup
    begun(config)
    with pytest.raises(UserError, match=f"stage.steps=10, now it is 20: .*{why}.*init_from="):
        again(config, stage__steps=20)


def test_a_directory_whose_making_was_cut_short_is_entered(config: RunConfig, capsys: pytest.CaptureFixture) -> None:
    run = run_dir.create(config)
    identity = run_dir.read_record(run)["id"]
    (run / "config.yaml").unlink()
    again(config)
    assert run_dir.read_record(run)["id"] == identity
    assert "warning" not in capsys.readouterr().err
    (run / "config.yaml").unlink()
    (run / "checkpoints").mkdir()
    again(config)
    assert "config.yaml was missing; it is written anew" in capsys.readouterr().err
    (run / "run.json").unlink()
    again(config)
    assert "run.json was missing; the run gets a new id" in capsys.readouterr().err
    assert "id" in read_json(run / "run.json", "-")


@pytest.mark.parametrize("file", ["facts.json", "checkpoints/latest", "samples/step-000040.jsonl", "hang/rank-0.json"])
def test_what_a_killed_writer_left_goes_with_the_next_start(config: RunConfig, file: str) -> None:
    place = begun(config) / file
    left = place.with_name(f".{place.name}.{'0' * 32}")
    left.parent.mkdir(exist_ok=True)
    left.touch()
    again(config)
    assert not left.exists()


def test_another_folder_is_left_alone(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is no run directory"):
        run_dir.create(config)


@pytest.mark.parametrize("content", [b"", b"seed: 0\n", b"\xff\xfe\0", "flip", "reference"])
def test_a_damaged_configuration_is_one_line(config: RunConfig, content: bytes | str) -> None:
    run = run_dir.create(config)
    file = run / "config.yaml"
    text = file.read_text()
    if content == "flip":
        file.write_text(text.replace("steps: 10", "steps: 11"))
    elif content == "reference":
        planted = text.rpartition("# checksum")[0].replace("seed: 0", "seed: ${oc.env:SECRET}")
        from common.files import text_checksum

        file.write_text(f"{planted}# checksum: {text_checksum(planted)}\n")
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml .*; restore it, or remove it"):
        configuration.load(file)


def test_a_configuration_without_its_checksum_is_cut_unless_the_run_is_older_than_checksums(config):
    run = run_dir.create(config)
    file = run / "config.yaml"
    text = file.read_text()
    file.write_text(text.rpartition("# checksum")[0])
    with pytest.raises(UserError, match="config.yaml is damaged: its last line, the checksum, is missing"):
        configuration.read(file)
    record = json.loads((run / "run.json").read_text())
    del record["checksum"]  # as release 0.1.0 wrote it
    (run / "run.json").write_text(json.dumps(record))
    assert configuration.read(file).stage.steps == 10
    old = file.read_text().replace("  log_every:", "  samples_every: 7\n  log_every:")  # its name of evaluation.every
    file.write_text(re.sub(r"(?m)^evaluation:\n  every: .*\n", "evaluation:\n", old))
    assert configuration.read(file).evaluation.every is None
    file.write_text(re.sub(r"(?m)^  val: .*$", "  val: squares/val", file.read_text()))
    assert configuration.read(file).evaluation.every == 7
