"""One task of a suite: its file for lmms-eval, its run against a server, and its result, kept once it is whole."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import DamagedFile, digest, read_json, write_atomically, write_json
from train.harness.catalogue import Benchmark
from train.harness.environment import PYTHON, VERSION, Environment, Process
from train.harness.local import INSIDE
from train.harness.ranks import Ranks
from train.harness.server import Server

# How lmms-eval writes down a request that failed, which it then scores as an answer.
_FAILED = "[LMMS_EVAL_REQUEST_FAILED"
ENTRY_POINT = "train.harness.inside.registry:manifests"
"""Of our models for lmms-eval; pyproject.toml names it too, for who installs this package there."""
# What runs inside lmms-eval's environment, whatever else is installed there.
_PACKAGES = ("common", "data_prep", "model", "train", "vlora")


@dataclass(frozen=True)
class Job:
    """One benchmark with one kind of images.

    Attributes:
        name: File of `conf/benchmark`, or the task of a split.
        benchmark: What it is.
        images: One of `catalogue.IMAGES`.
        limit: Ask the first questions alone; None: all.
    """

    name: str
    benchmark: Benchmark
    images: str = "own"
    limit: int | None = None

    @property
    def key(self) -> str:
        """Names its result."""
        return f"{self.name}-{self.images}" + (f"-{self.limit}" if self.limit else "")

    @property
    def task(self) -> str:
        """What lmms-eval calls it."""
        return self.name if self.is_split else f"vlora_{self.name}"

    @property
    def is_split(self) -> bool:
        """Whether it is a prepared split, which has its own folder."""
        return not self.benchmark.task


def write_tasks(folder: Path, environment: Environment, benchmarks: dict[str, Benchmark]) -> None:
    """Fill the folder that lmms-eval is started with: our settings on top of its own task files, and our modules."""
    python = folder / PYTHON
    python.mkdir(parents=True, exist_ok=True)
    for module in ("judges.py", "load_data.py"):
        shutil.copyfile(INSIDE / module, folder / module)
    for name in _PACKAGES:
        (python / name).unlink(missing_ok=True)
        (python / name).symlink_to(Path(__file__).resolve().parents[2] / name)
    # An installed package as Python sees it: so lmms-eval finds its entry point without anything being installed.
    package = python / "vlora_lmms_eval-0.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vlora-lmms-eval\nVersion: 0\n", encoding="utf-8")
    (package / "entry_points.txt").write_text(f"[lmms_eval.models]\nvlora = {ENTRY_POINT}\n", encoding="utf-8")
    for name, one in benchmarks.items():
        write_atomically(folder / f"vlora_{name}.yaml", task_file(name, one, environment.tasks))


def task_file(name: str, one: Benchmark, tasks: Path) -> str:
    """A task of lmms-eval, as a benchmark's file asks for it.

    Raises:
        UserError: this lmms-eval has no such task.
    """
    if not (tasks / one.task).is_file():
        raise UserError(f"conf/benchmark/{name}.yaml: lmms-eval {VERSION} has no task file {one.task}")
    task: dict[str, Any] = {
        "include": str(tasks / one.task),
        "task": f"vlora_{name}",
        "tag": [],
        "test_split": one.split,
        "generation_kwargs": {"max_new_tokens": one.max_tokens, "temperature": 0, "do_sample": False},
        "lmms_eval_specific_kwargs": {"default": one.prompt},
        **one.overrides,
    }
    text = yaml.safe_dump(task, sort_keys=False, allow_unicode=True)
    if one.functions:
        text += "metric_list:\n"
        for metric, function in one.functions.items():
            text += f"  - metric: {metric}\n    aggregation: !function {function}\n    higher_is_better: true\n"
    return text


class Results:
    """What has been measured of one export; a result of another export, or of other settings, is none.

    Args:
        folder: RUN/evaluation/benchmarks.
        export: Folder of the model.
    """

    def __init__(self, folder: Path, export: Path) -> None:
        self.folder = folder
        self._model = _model(export)

    def file(self, job: Job) -> Path:
        """Where a job's result is."""
        return self.folder / f"{job.key}.json"

    def identity(self, job: Job) -> str:
        """Of all that a result depends on."""
        return digest({"model": self._model, "benchmark": asdict(job.benchmark), "lmms_eval": VERSION, "key": job.key})

    def find(self, job: Job) -> dict[str, Any] | None:
        """The result of a job, if it was run to its end."""
        if not self.file(job).is_file():
            return None
        try:
            found = read_json(self.file(job), "")
        except DamagedFile:
            return None
        return found if found.get("identity") == self.identity(job) else None

    def keep(self, job: Job, found: dict[str, Any], samples: Path | None) -> dict[str, Any]:
        """Write a result, its predictions first."""
        if samples is not None:
            write_atomically(self.file(job).with_suffix(".jsonl"), samples.read_text(encoding="utf-8"))
        record = {**found, "identity": self.identity(job)}
        write_json(self.file(job), record)
        return record


def _model(export: Path) -> str:
    sums = export / "checksums.json"
    if sums.is_file():
        return digest(json.loads(sums.read_text(encoding="utf-8")))
    files = sorted(file for file in export.glob("*") if file.is_file())
    return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def run(
    job: Job,
    environment: Environment,
    tasks: Path,
    answering: Server | Ranks,
    results: Results,
    running: set[Process],
) -> dict[str, Any]:
    """Run one job and keep its result.

    Args:
        job: What to run.
        environment: lmms-eval's.
        tasks: Folder of `write_tasks`.
        answering: Who answers.
        results: Where to keep it.
        running: Holds its process while that runs, to be ended from elsewhere.

    Returns:
        Its record.

    Raises:
        UserError: lmms-eval failed, or a request did: a failed request would count as a wrong answer.
    """
    log = results.folder / "logs" / f"{job.key}.log"
    log.unlink(missing_ok=True)
    out = results.folder / "work" / job.key
    shutil.rmtree(out, ignore_errors=True)
    command = [str(environment.python), *answering.words(job.images)]
    command += ["--tasks", job.task, "--output_path", str(out), "--log_samples", "--include_path", str(tasks)]
    if job.limit:
        command += ["--limit", str(job.limit)]
    variables = environment.variables(tasks, offline=True) | answering.variables()
    begun = time.monotonic()
    with Process(command, variables, log) as process:
        running.add(process)
        code = process.popen.wait()
        running.discard(process)
    seconds = time.monotonic() - begun
    metrics = metrics_of(out, job.task)
    if code or metrics is None:
        raise UserError(f"{job.key}: lmms-eval ended with code {code} and no result: {process.tail()} ({log})")
    samples = next(iter(sorted(out.rglob(f"*_samples_{job.task}.jsonl"))), None)
    count, failed = (0, 0) if samples is None else count_answers(samples.read_text(encoding="utf-8"))
    if failed or not count:
        raise UserError(f"{job.key}: {failed} of {count} requests failed, so there is no score; see {log}")
    record = results.keep(job, record_of(job, metrics, count, seconds, answering.label), samples)
    shutil.rmtree(out, ignore_errors=True)
    return record


def count_answers(samples: str) -> tuple[int, int]:
    """Answers in what `--log_samples` writes, and those that are a failed request, which lmms-eval scores as wrong."""
    lines = [line for line in samples.split("\n") if line]  # an answer may hold what `splitlines` takes for an end
    return len(lines), sum(_FAILED in line for line in lines)


def metrics_of(out: Path, task: str) -> dict[str, float] | None:
    """What lmms-eval has written about one task below `out`; None: nothing."""
    # DATE_results.json, for some models in a folder of their name; some tasks write one of their own, without a date.
    files = sorted(out.rglob("[0-9]*_results.json"))
    if not files:
        return None
    values = json.loads(files[-1].read_text(encoding="utf-8"))["results"][task]
    numbers = {key.partition(",")[0]: value for key, value in values.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool)}


def record_of(job: Job, metrics: dict[str, float], count: int, seconds: float, by: str = "server") -> dict[str, Any]:
    """A result as it is kept.

    Raises:
        UserError: a metric of the benchmark is not among `metrics`.
    """
    one = job.benchmark
    if missing := [metric for metric in one.metric if metric not in metrics]:
        raise UserError(f"{job.key}: lmms-eval gives no {missing[0]}; it gives {', '.join(metrics) or 'nothing'}")
    return {
        "benchmark": one.title,
        "name": job.name,
        "images": job.images,
        "score": one.scale * sum(metrics[metric] for metric in one.metric) / len(one.metric),
        "metric": one.metric,
        "metrics": metrics,
        "questions": count,
        "limit": job.limit,
        "split": one.split,
        "prompt": one.prompt,
        "max_tokens": one.max_tokens,
        "judge": one.judge,
        "note": one.note,
        "lmms_eval": VERSION,
        "answered_by": by,
        "seconds": round(seconds, 1),
    }
