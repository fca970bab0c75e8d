"""One cluster for all tests of this folder, and the tiny model's runs on it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from data_prep.parts import builtin as parts
from data_prep.store.split import Split
from data_prep.store.writer import write_split
from tests.slurm.cluster import Cluster, available, wait
from train import config as configuration
from train.measure.tracking import read_metrics
from train.process import run_dir

ROOT = Path(__file__).resolve().parents[2]
STEPS = 32
EVERY = 4  # steps from one checkpoint to the next
Losses = list[tuple[int, float]]
"""(step, loss) of a run, in the order of its file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the cluster is marked `slurm`, directly or through another fixture."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two fake 8xA100 nodes."""
    if reason := available():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    # As Ctrl-C: what a time limit or a cancelled job of the CI sends must not skip the clean-up.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Site:
    """Submits the shipped batch scripts under a site profile of the test.

    Attributes:
        cluster: The cluster.
        folder: For runs, logs and the profile.
        overrides: Hydra overrides of a short run of the tiny model.
    """

    cluster: Cluster
    folder: Path
    overrides: list[str]
    env: dict[str, str]

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit with one CPU rank on each of the two nodes; returns the job's id."""
        shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=30")
        log = f"--output={self.folder}/%j.log"
        command = ("sbatch", "--parsable", *shape, log, *options, str(ROOT / "slurm" / script), *arguments)
        return self.cluster.run(*command, cwd=ROOT, **self.env, **variables)

    def pretrain(self, name: str, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> tuple[str, Path]:
        """Submit a pretraining; returns job id and run directory."""
        run = self.folder / name
        job = self.submit(
            "pretrain.sbatch", *self.overrides, f"run_dir={run}", *arguments, options=options, **variables
        )
        return job, run

    def twin(self, run: Path, name: str, tracking: str) -> Path:
        """A new run of the same configuration."""
        config = configuration.load(run / "config.yaml")
        config.run_dir, config.tracking.wandb = str(self.folder / name), tracking
        return run_dir.create(config)

    def log(self, job: str) -> str:
        """Output of a job so far."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def reach(self, run: Path, step: int, timeout: float = 900) -> None:
        """Wait until a run has done so many steps."""
        assert wait(lambda: last_step(run) >= step, timeout), f"{run} stays at step {last_step(run)}"

    def complete(self, job: str, run: Path, timeout: float = 900) -> Losses:
        """Wait for a job that must succeed; returns (step, loss) of its run."""
        state = self.cluster.finish(job, timeout)
        assert state == "COMPLETED" and (run / "DONE").exists(), f"{state}\n{self.log(job)}"
        return losses(run)


def losses(run: Path) -> Losses:
    """(step, loss) in the order of the file."""
    return [(r["step"], r["loss"]) for r in read_metrics(run) if "loss" in r]


def last_step(run: Path) -> int:
    """Last complete step, while the file is being written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return 0
    steps = [json.loads(line).get("step", 0) for line in lines if line.endswith("\n")]
    return max(steps, default=0)


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Tiny model, 96 captions, in folders of the test."""
    folder = tmp_path_factory.mktemp("site")
    cache = Path(os.environ.get("VLORA_CACHE", ROOT / ".cache"))
    tiny, vision = cache / "llm/tiny-llama", cache / "vision/dinov2-s14"
    parts.ensure("dinov2-s14", cache=cache)
    if not tiny.is_dir():
        pytest.skip(f"{tiny} is missing; make it with `python -m data_prep.parts.tiny_llm`")
    source = Split(cache / "data/easy_vqa/caption_train")
    data = folder / "data/small"
    write_split(data, islice((source[i] for i in range(96)), 96))
    profile = folder / "site.sh"
    profile.write_text(
        f"export VLORA_PYTHON={sys.executable} VLORA_CACHE={folder}/cache VLORA_SCRATCH={folder} VLORA_WANDB=disabled\n"
        f"export VLORA_LOGS={folder} VLORA_PREFLIGHT=${{VLORA_PREFLIGHT:-0}} VLORA_GRACE_SECONDS=60\n"
    )
    overrides = [
        *("llm=tiny", f"llm.path={tiny}", f"vision.path={vision}", "recipe=smollm2_135m/pretrain"),
        *("generator.layers=null", "generator.every=1", "generator.width=64", "generator.num_heads=4"),
        *("data.batch_size=8", f"data.train=[{{path:{data},weight:1.0}}]", "data.val=null", "data.test=null"),
        *(
            f"stage.steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "++tracking.weights_every=1000",
            "engine.timeout_minutes=5",
            "engine.hang_minutes=1",
        ),
    ]
    return Site(cluster, folder, overrides, {"VLORA_SITE": str(profile), "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="session")
def undisturbed(site: Site) -> Path:
    """Run directory of a run that nothing interrupts."""
    job, run = site.pretrain("undisturbed")
    site.complete(job, run)
    return run
