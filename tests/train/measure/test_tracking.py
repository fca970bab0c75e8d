"""`metrics.jsonl`: every record is known to be what was written, or the line is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import wandb
from PIL import Image

from common.files import DamagedFile, sealed_json
from tests.slurm import offline_wandb
from train.config import RunConfig, TrackingConfig
from train.measure.results import stage_figures
from train.measure.tracking import Tracker, read_metrics

STEPS = 6


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six steps and a validation, with a checkpoint at its end."""
    tracker = track(tmp_path, 0)
    for step in range(1, STEPS + 1):
        tracker.log(step, {"loss": 1 / step})
    tracker.log(STEPS, {"val_loss": 0.25})
    tracker.finish()
    (tmp_path / "checkpoints" / f"step-{STEPS:06d}").mkdir(parents=True)
    return tmp_path


def track(run: Path, step: int) -> Tracker:
    return Tracker(RunConfig(tracking=TrackingConfig(wandb="disabled")), run, {}, step, {})


def test_every_flipped_bit_is_named_or_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "metrics.jsonl"
    whole, expected = file.read_bytes(), read_metrics(run)
    (run / "DONE").touch()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        file.write_bytes(changed)
        try:
            assert read_metrics(run) == expected, changed
        except DamagedFile as error:
            assert str(file) in str(error)
    assert capsys.readouterr().err == ""


def test_a_resume_takes_damaged_lines_out_and_says_which(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("0.5", "0.7")
    file.write_text("".join(lines))
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl, line 2, is no record, or not as it was written; restore"):
        read_metrics(run)
    track(run, 4).finish()
    said = capsys.readouterr().err
    assert "1 lines, first 2, are no records" in said and "lacks 1 of the 4 steps made (2)" in said
    (run / "checkpoints" / f"step-{STEPS:06d}").rename(run / "checkpoints" / "step-000004")
    assert [r["step"] for r in read_metrics(run)] == [1, 3, 4]
    assert "lacks 1 of the 4 steps made (2)" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 2])
def test_steps_that_were_cut_off_are_missed(run: Path, kept: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:kept]) + lines[kept][:20])
    assert len(read_metrics(run)) == kept
    assert re.search(rf"warning: \S+metrics.jsonl lacks {6 - kept} of the 6 steps", capsys.readouterr().err)
    (run / "DONE").touch()  # nobody is writing that line now
    with pytest.raises(DamagedFile, match=f"line {kept + 1}"):
        read_metrics(run)


def test_records_of_the_first_release_have_no_checksum(run: Path) -> None:
    file = run / "metrics.jsonl"
    bare = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, STEPS + 1)]
    file.write_text("".join(bare))
    assert len(read_metrics(run)) == STEPS
    file.write_text("".join([*bare[:-1], sealed_json({"step": STEPS, "loss": 1.0})]))
    with pytest.raises(DamagedFile, match="line 1,"):
        read_metrics(run)


def test_pictures_of_offline_tables_lie_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `wandb sync` finds them from a host with another home folder and another temporary one."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # the tracker sets them for its process
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    run.mkdir()
    record = {"id": "abcd1234", "git_commit": None, "versions": {}}
    config = RunConfig(tracking=TrackingConfig(wandb="offline"), output_root=str(tmp_path))
    tracker = Tracker(config, run, record, 0, {})
    shades = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    tracker.table(1, "answers", ["image", "question"], [[shade, "what color?"] for shade in shades])
    tracker.finish()
    wandb.teardown()  # as the end of a process: what an older wandb still holds back is written
    (lifetime,) = offline_wandb.read(run)
    pictures = {name: file for name, file in lifetime.artifacts.items() if name.endswith(".png")}
    assert sorted(Image.open(file).getpixel((0, 0)) for file in pictures.values()) == [(s, 0, 0) for s in (0, 100, 200)]
    assert len(lifetime.artifacts) == 4 and lifetime.files  # the table itself
    for file in (*lifetime.artifacts.values(), *lifetime.files):
        assert file.is_relative_to(run) and file.is_file()


def test_figures_of_a_run_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl is missing or holds no step"):
        stage_figures(tmp_path)
