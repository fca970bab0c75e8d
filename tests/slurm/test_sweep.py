"""Sweeps and chains: composed here, run by SLURM, reported."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import DictConfig

from common.files import read_json
from tests.slurm import offline_wandb
from tests.slurm.cluster import wait
from tests.slurm.conftest import ROOT, Site, losses
from train import sweep_report
from train.cluster import slurm
from train.config import resolve

CPU = "ntasks-per-node:1,cpus-per-task:1,gpus-per-node:0,mem:1G,time:30"


def train(site: Site, module: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = site.cluster.env | site.env | {"OMP_NUM_THREADS": "1", "VLORA_CACHE": str(site.folder / "cache")}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_points_are_checked_before_anything_is_submitted(site: Site, tmp_path: Path) -> None:
    sweep = [f"hydra.sweep.dir={tmp_path}", "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=1"]
    done = train(site, "train", "-m", *sweep, *site.overrides, "generator.rank=4,100000")
    assert done.returncode == 2 and "error:" in done.stderr and "rank" in done.stderr
    assert not (tmp_path / "jobs.json").exists() and not (tmp_path / "submit.txt").exists()


def test_render_only(site: Site, tmp_path: Path) -> None:
    sweep = [f"hydra.sweep.dir={tmp_path}", "hydra/launcher=slurm", "hydra.launcher.submit=false"]
    shape = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2", "hydra.launcher.throttle=3"]
    done = train(site, "train", "-m", *sweep, *shape, *site.overrides, "generator.rank=4,8")
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "submit.txt").read_text().splitlines()
    assert (
        "--array=0-1%3" in line and "--nodes=2" in line and line.endswith(f"slurm/pretrain.sbatch --sweep {tmp_path}")
    )
    groups = {(tmp_path / str(i) / "config.yaml").read_text().count(f"group: {tmp_path.name}") for i in range(2)}
    assert groups == {1}


@pytest.mark.parametrize(
    ("experiment", "key", "values"),
    [
        ("ablation_types", "generator.types", ["qkvom", "qkvm", "qkv", "qko", "qk"]),  # paper, Table 3
        ("ablation_rank", "generator.rank", [16, 32, 64, 128]),  # Table 4
        ("ablation_blocks", "generator.num_blocks", [4, 8, 12]),  # Table 5
    ],
)
@pytest.mark.parametrize(("scale", "llm"), [("7b", "vicuna_7b"), ("mini", "smollm2_135m")])
def test_ablations_are_the_papers(experiment: str, key: str, values: list, scale: str, llm: str) -> None:
    """Sweeps over the tables' points, each of which is a valid run that differs in the one thing."""
    chosen = [f"experiment={experiment}", *(["scale=mini"] if scale == "mini" else [])]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sweep = compose("config", chosen, return_hydra_config=True)
        runs = [resolve(compose("config", [*chosen, f"{key}={value}"])) for value in values]
    assert sweep.hydra.mode is RunMode.MULTIRUN
    assert dict(sweep.hydra.sweeper.params) == {key: ",".join(map(str, values))}
    assert {run.llm.path for run in runs} == {resolve(compose_choice(f"llm={llm}")).llm.path}
    group, _, name = key.partition(".")
    assert [str(getattr(getattr(run, group), name)) for run in runs] == [str(value) for value in values]
    for run in runs:
        setattr(getattr(run, group), name, values[0])
    assert all(run == runs[0] for run in runs)


def compose_choice(override: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [override])


@pytest.mark.slow
def test_two_by_two_sweep_and_its_report(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reported while it runs, and in the end with a point that has failed; all in one wandb group."""
    folder = site.folder / "sweep"
    launcher = ["hydra/launcher=slurm", "hydra.launcher.nodes=1", "hydra.launcher.tasks_per_node=1"]
    options = f"+hydra.launcher.sbatch={{{CPU},output:{site.folder}/sweep-%a.log}}"
    points = ["generator.rank=4,8", "generator.num_blocks=1,2", "stage.steps=3", f"hydra.sweep.dir={folder}"]
    done = train(site, "train", "-m", *launcher, options, *site.overrides, *points, "tracking=offline")
    assert done.returncode == 0, done.stderr
    job = json.loads((folder / "jobs.json").read_text())["train"]
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, site.cluster.env[name])
    assert wait(lambda: "RUNNING" in slurm.states(job).values(), 30)
    assert {row["state"] for row in sweep_report.collect(folder)} == {"running", "waiting"}
    state = site.cluster.finish(job, 900)
    logs = "".join(f.read_text()[-1500:] for f in site.folder.glob("sweep-*.log"))
    assert state == "COMPLETED", logs
    (folder / "3/DONE").unlink()
    (folder / "3/FAILED").write_text("a reason\n")

    done = train(site, "train.sweep_report", str(folder))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "points.csv").open()))
    assert [(r["rank"], r["blocks"], r["state"]) for r in rows] == [
        ("4", "1", "finished"), ("4", "2", "finished"), ("8", "1", "finished"), ("8", "2", "failed"),
    ]  # fmt: skip
    for row in rows:
        expected = [loss for _, loss in losses(folder / row["point"])]
        assert len(expected) == 3 and float(row["loss"]) == pytest.approx(sum(expected) / 3)
    report = (folder / "report.md").read_text()
    assert "3 finished, 1 failed" in report and "a reason" in report
    assert (folder / "loss.png").stat().st_size > 1000 and (folder / "curves.png").exists()
    assert (folder / "speed.png").exists() != ("Speed is not drawn" in report)
    lifetimes = [life for where in (folder, *(folder / str(i) for i in range(4))) for life in offline_wandb.read(where)]
    assert len(lifetimes) == 5 and {life.group for life in lifetimes} == {"sweep"}
    (logged,) = [life for life in lifetimes if life.job_type == "report"]
    assert {key.partition(".")[0] for row in logged.rows for key in row} >= {"points", "loss", "curves"}


def test_a_failed_link_stops_the_chain(site: Site, tmp_path: Path) -> None:
    """Data preparation fails: nothing behind it starts, and the status says why."""
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\nexit 3\n")
    failing.chmod(0o755)
    profile = Path(site.env["VLORA_SITE"]).read_text() + f"export VLORA_PYTHON={failing}\n"
    (tmp_path / "site.sh").write_text(profile)
    other = Site(site.cluster, tmp_path, site.overrides, site.env | {"VLORA_SITE": str(tmp_path / "site.sh")})
    folder = tmp_path / "chain"
    small = [f"--sbatch={o}" for o in ("cpus-per-task=1", "gpus-per-node=0", "mem=1G", f"output={tmp_path}/%x.log")]
    data = [f"--prepare-sbatch={o}" for o in ("array=0-0", "cpus-per-task=1", "mem=1G", f"output={tmp_path}/%x.log")]
    overrides = [o for o in site.overrides if not o.startswith("recipe")]
    shape = ["--source", "easy_vqa", "--nodes", "2", "--tasks-per-node", "1"]
    recipe = ["recipe=smollm2_135m/pretrain"]
    done = train(other, "train.chain", str(folder), *shape, *small, *data, *overrides, *recipe)
    assert done.returncode == 0, done.stderr
    jobs = read_json(folder / "chain.json", "-")
    assert list(jobs) == ["prepare", "pretrain", "finetune", "evaluate"]
    for job in jobs.values():
        site.cluster.finish(job, 60)
    text = train(other, "train.chain", str(folder), "--status").stdout
    assert "the chain stopped at prepare" in text and text.count("because prepare did not succeed") == 3, text


def test_without_slurm_the_error_is_clear(site: Site, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PATH"} | {"PATH": str(tmp_path)}
    (tmp_path / "bash").symlink_to("/bin/bash")
    code = "from train.cluster import slurm; slurm.submit(['sbatch'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "sbatch is not found" in done.stderr
