"""The names of all files of a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """One directory = one run = one wandb run.

    Attributes:
        path: The directory.

    | file | what |
    | --- | --- |
    | `config.yaml` | the resolved configuration, all that workers read |
    | `run.json` | id, command, git commit, versions, creation time, fingerprints of the models |
    | `git.diff` | uncommitted changes of the code, if any |
    | `facts.json` | what the run found out: world size, steps, parameters per part, the best step |
    | `metrics.jsonl` | one record per line |
    | `checkpoints/` | what the run resumes from, and the best by validation loss |
    | `samples/` | tables of questions, answers and predictions |
    | `export/` | the trained model, a Hugging Face folder |
    | `evaluation/` | scores and predictions of `train.evaluate` |
    | `report/` | the page and pictures of `train.report` |
    | `wandb/` | wandb's own files |
    | `STOP` | asks a running job to stop, whatever it holds |
    | `STOPPED` | the run has stopped on request, with a checkpoint |
    | `DONE` | the stage has finished and its export is written |
    | `FAILED` | why a job gave up (on a cluster) |
    | `crashes` | one line per crash (on a cluster) |
    | `profile/` | traces of chosen steps (`debug.profile`); after a GPU ran out of memory, what filled it |
    | `hang/` | after a hang: where every rank stood |
    | `logs/` | `rank-N.log`: what each rank printed, all starts |
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """Id, command, versions."""
        return self.path / "run.json"

    @property
    def diff(self) -> Path:
        """Uncommitted changes of the code."""
        return self.path / "git.diff"

    @property
    def hang(self) -> Path:
        """Where every rank stood in a hang."""
        return self.path / "hang"

    @property
    def logs(self) -> Path:
        """What each rank printed."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """Folder of traces and memory snapshots."""
        return self.path / "profile"

    @property
    def facts(self) -> Path:
        """What the run found out."""
        return self.path / "facts.json"

    @property
    def metrics(self) -> Path:
        """One record per line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the sample tables."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        """The trained model."""
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        """Folder of scores and predictions."""
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def stop(self) -> Path:
        """Asks a running job to stop."""
        return self.path / "STOP"

    @property
    def stopped(self) -> Path:
        """The run has stopped on request."""
        return self.path / "STOPPED"

    @property
    def done(self) -> Path:
        """The stage has finished."""
        return self.path / "DONE"

    @property
    def failed(self) -> Path:
        """Why a job gave up."""
        return self.path / "FAILED"
