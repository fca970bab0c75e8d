"""Sweeps: a folder of run directories, and Hydra's `hydra/launcher=slurm`, which submits one as a job array.

    python -m train -m generator.rank=16,32,64,128 generator.num_blocks=4,8,12
    python -m train -m hydra/launcher=slurm hydra.launcher.nodes=2 generator.rank=16,32,64,128

SWEEP_DIR/0/, 1/, ...      run directories of the points
SWEEP_DIR/manifest.jsonl   one line per point: number and overrides
SWEEP_DIR/jobs.json        ids of the job arrays
SWEEP_DIR/submit.txt       the command lines that submit them
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from common.errors import UserError
from train.cluster import slurm

MANIFEST = "manifest.jsonl"
JOBS = "jobs.json"
# Hydra instantiates launchers of this namespace only; a package of that name for one class is not worth it.
_NAMESPACE = "hydra_plugins.vlora"


def enter(composed: DictConfig) -> DictConfig:
    """Give a point of a sweep its run directory and wandb group, and note it in the manifest; other runs pass."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return composed
    folder = Path(hydra.sweep.dir).absolute()
    group = OmegaConf.select(composed, "tracking.group") or folder.name
    OmegaConf.update(composed, "tracking.group", group, force_add=True)
    OmegaConf.update(composed, "run_dir", str(folder / str(hydra.job.num)), force_add=True)
    ours = ("launch.mode=", "launch.workers=")
    overrides = [o for o in hydra.overrides.task if not o.startswith(ours)]
    with (folder / MANIFEST).open("a") as stream:
        stream.write(json.dumps({"index": hydra.job.num, "overrides": overrides}) + "\n")
    return composed


def points(folder: Path) -> dict[int, list[str]]:
    """Number and overrides of every point of a sweep, by number.

    Raises:
        UserError: not a sweep's folder.
    """
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a sweep ({error})") from error
    records = [json.loads(line) for line in lines]
    return dict(sorted((r["index"], r["overrides"]) for r in records))


@dataclass
class SlurmLauncherConfig:
    """Keys of `hydra.launcher` with `hydra/launcher=slurm`.

    Attributes:
        nodes, tasks_per_node: Of each point.
        throttle: Points that may run at the same time; null: any number.
        submit: False: check and prepare all points, write what would be submitted, submit nothing.
        evaluate: Also submit a second array that scores each point once it has finished (needs `data.test`).
        sbatch: Further options of sbatch, by their long names: `{time: "2:00:00", gpus-per-node: 4}`.
        evaluate_sbatch: The same for the evaluation.
    """

    _target_: str = f"{_NAMESPACE}.SlurmLauncher"
    nodes: int = 1
    tasks_per_node: int = 8
    throttle: int | None = None
    submit: bool = True
    evaluate: bool = True
    sbatch: dict[str, Any] = field(default_factory=dict)
    evaluate_sbatch: dict[str, Any] = field(default_factory=dict)


class SlurmLauncher(BasicLauncher):
    """Prepares every point here and now, submits them as one job array of the ordinary batch script, and returns.

    A point that is wrong ends the sweep before anything is submitted. The elements of the array stop, requeue and go
    on independently of each other and of this process.

    Args: see `SlurmLauncherConfig`.
    """

    def __init__(
        self,
        nodes: int,
        tasks_per_node: int,
        throttle: int | None,
        submit: bool,
        evaluate: bool,
        sbatch: dict[str, Any],
        evaluate_sbatch: dict[str, Any],
    ) -> None:
        super().__init__()
        self.nodes, self.tasks_per_node, self.throttle = nodes, tasks_per_node, throttle
        self.submit, self.evaluate = submit, evaluate
        self.options, self.evaluate_options = sbatch, evaluate_sbatch

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each point."""
        prepare_only = ["launch.mode=none", f"launch.workers={self.nodes * self.tasks_per_node}"]
        results = super().launch([[*o, *prepare_only] for o in job_overrides], initial_job_idx)
        for result in results:
            _ = result.return_value  # raises the error of a point that failed
        assert self.config is not None  # `setup` was called before
        folder = Path(self.config.hydra.sweep.dir).absolute()
        last = initial_job_idx + len(job_overrides) - 1
        array = f"{initial_job_idx}-{last}"
        throttle = f"%{self.throttle}" if self.throttle else ""
        shape = {"nodes": self.nodes, "ntasks-per-node": self.tasks_per_node, **self.options}
        logs = {"output": "slurm/logs/%x-%A_%a.out"}  # %j would be another number for the array's last element
        stage = str(self.config.stage.name)
        train = slurm.command(
            f"{stage}.sbatch",
            ["--sweep", str(folder)],
            {"array": array + throttle, "job-name": f"vlora-{folder.name}", **logs, **shape},
        )
        evaluation = slurm.command(
            "evaluate.sbatch",
            ["--sweep", str(folder)],
            # aftercorr: element i waits for element i, not for the whole sweep.
            {
                "array": array,
                "dependency": "aftercorr:{train}",
                "kill-on-invalid-dep": "yes",
                **logs,
                **self.evaluate_options,
            },
        )
        commands = {"train": train}
        if self.evaluate and OmegaConf.select(self.config, "data.test"):
            commands["evaluate"] = evaluation
        (folder / "submit.txt").write_text("".join(shlex.join(c) + "\n" for c in commands.values()))
        if not self.submit:
            print(f"{len(job_overrides)} points prepared in {folder}, nothing submitted (hydra.launcher.submit=false)")
            return results
        jobs: dict[str, str] = {}
        for name, words in commands.items():
            jobs[name] = slurm.submit([word.format(**jobs) if "{train}" in word else word for word in words])
            (folder / JOBS).write_text(json.dumps(jobs) + "\n")
        print(
            f"{len(job_overrides)} points submitted as job array {jobs['train']}\n"
            f"table and plots at any time: python -m train.sweep_report {folder}"
        )
        return results


def register_launcher() -> None:
    """Make `hydra/launcher=slurm` known to Hydra."""
    plugins = Plugins.instance()  # made first: it would search what stands in for a package below
    SlurmLauncher.__module__ = _NAMESPACE
    # Hydra imports it by that name.
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[_NAMESPACE] = sys.modules[__name__]
    plugins.register(SlurmLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmLauncherConfig, provider="vlora")
