"""Sweeps: a folder of run directories; points run here one after another, or as a job array (`hydra/launcher=slurm`).

    python -m train -m generator.rank=16,32,64,128 generator.num_blocks=4,8,12
    python -m train -m hydra/launcher=slurm hydra.launcher.nodes=2 generator.rank=16,32,64,128
    ... hydra.launcher.finetune=true      stage 2 of every point as well, each when its stage 1 has finished

SWEEP_DIR/0/, 1/, ...      run directories of the points
SWEEP_DIR/manifest.jsonl   one line per point: number and overrides
SWEEP_DIR/jobs.json        ids of the job arrays
SWEEP_DIR/submit.txt       the command lines that submit them
SWEEP_DIR/finetune/        the same of stage 2, as a sweep of its own
"""

from __future__ import annotations

import json
import re
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

from common import settings
from common.errors import ConfigError, UserError
from common.files import DamagedFile, read_records, read_text, write_atomically, write_json
from common.settings import setting
from train.cluster import slurm

MANIFEST = "manifest.jsonl"
JOBS = "jobs.json"
# Hydra instantiates launchers of this namespace only; a package of that name for one class is not worth it.
_NAMESPACE = "hydra_plugins.vlora"
_OURS = ("array", "dependency", "kill-on-invalid-dep", "parsable")


def enter(composed: DictConfig) -> DictConfig:
    """Give a point of a sweep its run directory and wandb group, and note it in the manifest; other runs pass."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return composed
    folder = Path(hydra.sweep.dir).absolute()
    name = str(folder.relative_to(_whole(folder).parent))
    group = OmegaConf.select(composed, "tracking.group") or name
    OmegaConf.update(composed, "tracking.group", group, force_add=True)
    OmegaConf.update(composed, "run_dir", str(folder / str(hydra.job.num)), force_add=True)
    ours = ("launch.mode=", "launch.workers=")
    overrides = [o for o in hydra.overrides.task if not o.startswith(ours)]
    if OmegaConf.select(composed, "tracking.name") is None:
        swept = set(hydra.sweeper.get("params") or {})  # and those of the command line
        swept |= {word.partition("=")[0] for word in sys.argv if _is_swept(word.partition("=")[2])}
        varied = (word.partition("=") for word in overrides)
        values = [f"{key.rpartition('.')[2]}={value}" for key, _, value in varied if key in swept]
        OmegaConf.update(composed, "tracking.name", f"{group}/{hydra.job.num} {' '.join(values)}".strip()[:128])
    lines = read_text(folder / MANIFEST, "remove it") if (folder / MANIFEST).exists() else ""
    point = json.dumps({"index": hydra.job.num, "overrides": overrides})
    if point not in lines.splitlines():  # or it was prepared, or begun, before
        write_atomically(folder / MANIFEST, f"{lines}{point}\n")
    return composed


def same() -> str:
    """What the command of a sweep needs to find its folder again; empty outside of a sweep."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or any(word.startswith("hydra.sweep.dir=") for word in sys.argv):
        return ""
    return f" with hydra.sweep.dir={_whole(Path(hydra.sweep.dir).absolute())}"


def _whole(folder: Path) -> Path:
    """The folder of the command: of a stage 2 that follows its stage 1, the folder above."""
    return folder.parent if folder.name == "finetune" and (folder.parent / MANIFEST).exists() else folder


def _is_swept(value: str) -> bool:
    """Whether a value on a command line stands for several: `a,b` outside of brackets, `range(...)`, `choice(...)`."""
    outside = re.sub(r"\[.*?\]", "", re.sub(r"\{.*?\}|'.*?'|\".*?\"", "", value))
    return "," in outside or re.match(r"(choice|range|glob|interval|sort|shuffle)\(", value) is not None


def points(folder: Path) -> dict[int, list[str]]:
    """Number and overrides of every point of a sweep, by number.

    Raises:
        UserError: not a sweep's folder.
        DamagedFile: a line of its manifest is no point.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise UserError(f"{folder} is not the folder of a sweep (no {MANIFEST})")
    remedy = "restore it, or submit the sweep again: finished points are kept"
    found = {}
    for record in read_records(file, ("index", "overrides"), remedy):
        try:
            found[int(record["index"])] = [str(o) for o in record["overrides"]]
        except (ValueError, TypeError) as error:
            raise DamagedFile(f"{file}: {json.dumps(record)} is no point of a sweep; {remedy}") from error
    return dict(sorted(found.items()))


@dataclass
class LocalLauncherConfig:
    """Keys of `hydra.launcher` where the points of a sweep run on this machine.

    Attributes:
        finetune: After the pretraining of all points, also run stage 2 of each, from what its stage 1 exports, with the
            overrides of the point and the recipe of stage 2.
    """

    _target_: str = f"{_NAMESPACE}.LocalLauncher"
    finetune: bool = False


class _Launcher(BasicLauncher):
    """What the launchers share: keys that are checked, and points whose errors end the sweep."""

    keys: LocalLauncherConfig | SlurmLauncherConfig

    def _begin(self) -> tuple[DictConfig, Path]:
        """The configuration and the folder of the sweep.

        Raises:
            ConfigError, UserError: a key is wrong, or asks for a stage 2 that cannot follow.
        """
        assert self.config is not None  # `setup` was called before
        settings.check(self.keys, "hydra.launcher.")  # not sooner: Hydra would wrap the error in one of its own
        if self.keys.finetune:
            require_pretraining(self.config)
        return self.config, Path(self.config.hydra.sweep.dir).absolute()

    def _run(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """Each point in turn, here and now."""
        results = super().launch(job_overrides, first)
        for result in results:
            _ = result.return_value  # raises the error of a point that failed
        return results

    def _prepare(
        self, job_overrides: Sequence[Sequence[str]], first: int, shape: Sequence[str] = ()
    ) -> Sequence[JobReturn]:
        """Compose and check every point, and make its run directory; with further overrides."""
        return self._run([[*point, "launch.mode=none", *shape] for point in job_overrides], first)


class LocalLauncher(_Launcher):
    """Hydra's own launcher, which runs one point after another; then stage 2 of each, where that is asked for.

    All of them are composed and checked, and get their run directories, before the first begins.

    Args:
        keys: Those of `LocalLauncherConfig`.
    """

    keys: LocalLauncherConfig

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.keys = LocalLauncherConfig(**keys)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each point."""
        _, folder = self._begin()
        stages = [job_overrides]
        if self.keys.finetune:
            stages.append(second_stage(job_overrides, initial_job_idx, folder))
        for points_ in stages:
            self._prepare(points_, initial_job_idx)
        return [self._run(points_, initial_job_idx) for points_ in stages][-1]


def require_pretraining(config: DictConfig) -> None:
    """Stage 2 can only follow stage 1.

    Raises:
        UserError: the sweep has another stage.
    """
    if (stage := config.stage.name) != "pretrain":
        raise UserError(f"hydra.launcher.finetune=true follows a pretraining, but this sweep has stage={stage}")


def second_stage(points_: Sequence[Sequence[str]], first: int, folder: Path) -> list[list[str]]:
    """The overrides of stage 2 of every point; `first` is the number of the first."""
    (folder / "finetune").mkdir(parents=True, exist_ok=True)
    second = ["stage=finetune", f"hydra.sweep.dir={folder / 'finetune'}"]
    return [
        [*(o for o in point if not o.startswith("stage=")), *second, f"init_from={folder / str(first + number)}"]
        for number, point in enumerate(points_)
    ]


@dataclass
class SlurmLauncherConfig:
    """Keys of `hydra.launcher` with `hydra/launcher=slurm`.

    Attributes:
        nodes, tasks_per_node: Of each point.
        throttle: Points that may run at the same time; null: any number.
        submit: False: check and prepare all points, write what would be submitted, submit nothing.
        evaluate: Also submit a second array that scores each point once it has finished (needs `data.test`).
        finetune: After a pretraining, also prepare and submit stage 2 of each point, from what its stage 1 exports,
            with the overrides of the point and the recipe of stage 2; then the evaluation is that of stage 2.
        sbatch: Further options of sbatch, by their long names: `{time: "2:00:00", gpus-per-node: 4}`.
        evaluate_sbatch: The same for the evaluation.
    """

    _target_: str = f"{_NAMESPACE}.SlurmLauncher"
    nodes: int = setting(1, within="[1, 65536]")
    tasks_per_node: int = setting(8, within="[1, 1024]")
    throttle: int | None = setting(None, within="[1, 1e6]")
    submit: bool = True
    evaluate: bool = True
    finetune: bool = False
    sbatch: dict[str, Any] = field(default_factory=dict)
    evaluate_sbatch: dict[str, Any] = field(default_factory=dict)

    def check(self, prefix: str) -> None:
        """Options that sbatch can be given, and that are not the launcher's own.

        Raises:
            ConfigError: names the option and what is wrong with it.
        """
        for key in ("sbatch", "evaluate_sbatch"):
            for name, value in getattr(self, key).items():
                option, place = str(name).replace("_", "-"), f"{prefix}{key}.{name}"
                if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
                    raise ConfigError(f"{place}: write sbatch's long name of an option, without dashes before it")
                if option in _OURS:
                    raise ConfigError(f"{place}: the launcher sets --{option} itself")
                if (
                    not isinstance(value, str | int | float | None)
                    or not str(value).isprintable()
                    or not str(value).strip()
                ):
                    raise ConfigError(f"{place}={value!r}: give one printable value")


class SlurmLauncher(_Launcher):
    """Prepares every point here and now, submits them as one job array of the ordinary batch script, and returns.

    A point that is wrong ends the sweep before anything is submitted. The elements of the array stop, requeue and go
    on independently of each other and of this process.

    Args:
        keys: Those of `SlurmLauncherConfig`.
    """

    keys: SlurmLauncherConfig

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.keys = SlurmLauncherConfig(**keys)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each point."""
        config, folder = self._begin()
        stage = str(config.stage.name)
        shape = [f"launch.workers={self.keys.nodes * self.keys.tasks_per_node}"]
        results = self._prepare(job_overrides, initial_job_idx, shape)
        last = initial_job_idx + len(job_overrides) - 1
        array = f"{initial_job_idx}-{last}"
        sweeps = {"train": (stage, folder)}
        if self.keys.finetune:
            sweeps["finetune"] = ("finetune", folder / "finetune")
            self._prepare(second_stage(job_overrides, initial_job_idx, folder), initial_job_idx, shape)
        commands: dict[str, list[str]] = {}
        for name, (stage, points_of) in sweeps.items():
            commands[name] = self._command(f"{stage}.sbatch", points_of, array, list(commands), self.keys.sbatch)
        if self.keys.evaluate and OmegaConf.select(config, "data.test"):
            commands["evaluate"] = self._command("evaluate.sbatch", points_of, array, list(commands), None)
        write_atomically(folder / "submit.txt", "".join(shlex.join(c) + "\n" for c in commands.values()))
        if not self.keys.submit:
            print(f"{len(job_overrides)} points prepared in {folder}, nothing submitted (hydra.launcher.submit=false)")
            return results
        jobs: dict[str, str] = {}
        for name, words in commands.items():
            jobs[name] = slurm.submit(
                [word.format(**jobs) if word.startswith("--dependency") else word for word in words]
            )
            write_json(folder / JOBS, jobs)
        if self.keys.finetune:
            ours = {"train": jobs["finetune"]} | {name: job for name, job in jobs.items() if name == "evaluate"}
            write_json(folder / "finetune" / JOBS, ours)
        arrays = ", ".join(f"{name} {job}" for name, job in jobs.items())
        print(
            f"{len(job_overrides)} points submitted as job arrays: {arrays}\n"
            f"table and plots at any time: python -m train.sweep_report {points_of}"
        )
        return results

    def _command(
        self, script: str, folder: Path, array: str, before: list[str], options: dict[str, Any] | None
    ) -> list[str]:
        """The sbatch call of one array, whose element i waits for element i of the one before it."""
        logs = {"output": "slurm/logs/%x-%A_%a.out"}  # %j would be another number for the array's last element
        shape: dict[str, Any] = dict(self.keys.evaluate_sbatch)
        if options is not None:
            throttle = f"%{self.keys.throttle}" if self.keys.throttle else ""
            name = f"vlora-{folder.parent.name}-finetune" if before else f"vlora-{folder.name}"
            array += throttle
            shape = {"job-name": name, "nodes": self.keys.nodes, "ntasks-per-node": self.keys.tasks_per_node, **options}
        # aftercorr: not for the whole of it.
        after = {"dependency": f"aftercorr:{{{before[-1]}}}", "kill-on-invalid-dep": "yes"} if before else {}
        return slurm.command(script, ["--sweep", str(folder)], {"array": array, **after, **logs, **shape})


def register_launchers() -> None:
    """Make `hydra/launcher=slurm` known to Hydra, and our local launcher the one that it takes by itself."""
    plugins = Plugins.instance()  # made first: it would search what stands in for a package below
    # Hydra imports them by that name.
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[_NAMESPACE] = sys.modules[__name__]
    launchers = {"slurm": (SlurmLauncher, SlurmLauncherConfig), "basic": (LocalLauncher, LocalLauncherConfig)}
    for name, (launcher, keys) in launchers.items():
        launcher.__module__ = _NAMESPACE
        plugins.register(launcher)
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=keys, provider="vlora")
