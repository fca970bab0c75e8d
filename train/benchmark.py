"""`python -m train.benchmark run=RUN suite=paper`: the field's benchmarks, by lmms-eval against our own server.

    python -m train.benchmark suite=paper fetch=true              # on a machine with internet: the data, into the cache
    python -m train.benchmark run=outputs/RUN suite=paper         # the ten of the paper's Tables 1 and 6
    python -m train.benchmark run=outputs/RUN suite=seeing        # POPE, GQA, VQAv2: own image, a wrong one, none
    python -m train.benchmark run=outputs/RUN split=test          # a prepared split, as train.evaluate scores it
    python -m train.benchmark run=outputs/RUN suite=all ranks=8   # in lmms-eval's own processes, no server

Starts one server per GPU (with ranks=N lmms-eval itself answers), runs lmms-eval in its own environment (`make
benchmarks-env`) task by task, and writes RUN/evaluation/benchmarks.json and benchmarks.md; one file per finished task,
with its predictions, lies in RUN/evaluation/benchmarks. Run it again after it was stopped: finished tasks are not run
again. What each benchmark is asked, and how it is scored, is in conf/benchmark.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from common.errors import ConfigError, UserError, run_cli
from common.files import checksum, write_atomically, write_json
from common.options import parse_options
from common.places import cache
from common.settings import setting
from train import config as configuration
from train.config import MovedTo, RunConfig
from train.harness import catalogue, jobs, local, server, table
from train.harness.catalogue import IMAGES, Benchmark
from train.harness.environment import Environment, Process
from train.harness.jobs import Job, Results
from train.harness.ranks import Ranks
from train.harness.server import Server
from train.measure.tracking import log_scores
from train.process.run_files import RunDir


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        run: Run directory with an export.
        suite: `paper`, `seeing` or `all`; null: only what `tasks` and `split` name.
        tasks: Benchmarks by name (files of conf/benchmark), with commas between; null: those of the suite.
        split: Also a prepared split: `test` or `val` of the run's data, or a folder below its `data.root`.
        images: `own`, `shuffled` or `none`, with commas between; null: as the suite says.
        limit: Ask the first questions alone (of a split: a fixed random choice, as train.evaluate's `max_samples`).
        ranks: Answer in so many processes of lmms-eval itself, one per GPU; null: by one server per GPU, which stays up
            from task to task.
        fetch: Only bring the data into the cache that jobs read, on a machine with internet.
        environment: Where lmms-eval is; null: `$VLORA_BENCHMARKS`, or `.venv-benchmarks` of the checkout.
        llm, vision: `llm.path=...`, `vision.path=...`: where the run's base models are now, if they have moved.
    """

    run: str | None = setting(None, path=True)
    suite: str | None = setting(None, choices=("paper", "seeing", "all", None))
    tasks: str | None = None
    split: str | None = None
    images: str | None = None
    limit: int | None = setting(None, within="[1, 1e9]")
    ranks: int | None = setting(None, within="[1, 1024]")
    fetch: bool = False
    environment: str | None = setting(None, path=True)
    llm: MovedTo = field(default_factory=MovedTo)
    vision: MovedTo = field(default_factory=MovedTo)


class Stopped(UserError):
    """A signal asks to end."""


def chosen(options: Options) -> tuple[dict[str, Benchmark], tuple[str, ...]]:
    """The benchmarks and the images of a command line.

    Raises:
        ConfigError: nothing is chosen, or what is chosen does not exist.
    """
    found, images = catalogue.suite(options.suite) if options.suite else ({}, IMAGES[:1])
    if options.tasks is not None:
        found = {name: catalogue.load(name) for name in _words(options.tasks)}
    if not found and options.split is None:
        raise ConfigError("name what to run: suite=paper|seeing|all, tasks=NAME,... or split=test")
    if options.images is not None:
        images = tuple(_words(options.images))
        if not images:
            raise ConfigError(f"images={options.images}: choose of {', '.join(IMAGES)}")
        if unknown := [each for each in images if each not in IMAGES]:
            raise ConfigError(f"images={unknown[0]}: choose of {', '.join(IMAGES)}")
    return found, images


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def fetch(environment: Environment, benchmarks: dict[str, Benchmark]) -> int:
    """Bring the data of benchmarks into the cache, one after another; says for each whether it is there."""
    folder = cache() / "benchmarks"
    jobs.write_tasks(folder, environment, benchmarks)
    failed = 0
    for name in benchmarks:
        wrong = environment.load_data(folder, [f"vlora_{name}"], offline=False)
        failed += bool(wrong)
        print(f"{name}: {wrong[f'vlora_{name}'] if wrong else 'is there'}", flush=True)
    if failed:
        print("A gated or rate-limited data set wants a token: `hf auth login`, or HF_TOKEN.", file=sys.stderr)
    return 2 if failed else 0


def split_job(config: RunConfig, split: str, folder: Path, images: str, limit: int | None) -> Job:
    """A prepared split as a job; writes its task into `folder`."""
    name = local.export(config, split, folder, limit)
    one = Benchmark(
        title=name,
        suite="split",
        task="",
        split=split,
        metric=["right"],
        max_tokens=config.evaluation.max_new_tokens,
        note="prepared by us, scored as train.evaluate scores it",
        overrides={"questions": checksum(folder / f"{name}.parquet")},
    )
    return Job(name, one, images, limit)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Signals that ask to end become an exception, so that everything started is ended."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; run the same command again to resume")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run_jobs(
    pending: Sequence[Job],
    run: Path,
    environment: Environment,
    tasks: Path,
    results: Results,
    moved: dict[str, str],
    ranks: int | None = None,
) -> list[str]:
    """Run jobs on one server per GPU, each server one at a time, or one after another on ranks.

    Args:
        pending: What to run.
        run: Run directory.
        environment: lmms-eval's.
        tasks: Folder of its tasks.
        results: Where results are kept.
        moved: `llm`, `vision`: where the run's base models are now, if they have moved.
        ranks: Processes that answer in place of servers.

    Returns:
        What went wrong, one line per job that has no result.

    Raises:
        UserError: a server does not start.
    """
    failed: list[str] = []
    running: set[Process] = set()
    free: SimpleQueue[Server | Ranks] = SimpleQueue()

    def one(job: Job) -> None:
        on = free.get()
        try:
            record = jobs.run(job, environment, tasks, on, results, running)
            print(f"{job.key}: {record['score']:.2f} ({record['questions']} questions)", flush=True)
        except UserError as error:
            failed.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
        finally:
            free.put(on)

    with ExitStack() as stack:
        started = []
        for number, gpu in enumerate(server.gpus()[: len(pending)] if ranks is None else ()):
            on = Server.start(run, results.folder / "logs" / f"server-{number}.log", gpu, moved)
            stack.callback(on.process.stop)
            started.append(on)
        # On the way out in reverse: no further job starts, lmms-eval's processes end, then the servers.
        pool = ThreadPoolExecutor(max_workers=max(1, len(started)))
        stack.callback(_stop_all, running)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        if ranks is not None:
            free.put(Ranks(run, ranks, moved))
        for on in started:
            on.wait()
            free.put(on)
        for future in [pool.submit(one, job) for job in pending]:
            future.result()
    return failed


def _stop_all(running: set[Process]) -> None:
    for process in list(running):
        process.stop()


def report(run: Path, results: Results, wanted: Sequence[Job], config: RunConfig) -> None:
    """Write RUN/evaluation/benchmarks.json and .md of everything measured so far, and log it to the run's wandb."""
    known = {job.key: job for job in wanted}
    for name in catalogue.names():
        for images in IMAGES:
            job = Job(name, catalogue.load(name), images)
            known.setdefault(job.key, job)
    records = [record for job in known.values() if (record := results.find(job)) is not None]
    records.sort(key=lambda record: (record["name"], IMAGES.index(record["images"]), record["limit"] or 0))
    # A part of the questions is no benchmark score.
    scores = {one["benchmark"]: one["score"] for one in records if one["images"] == IMAGES[0] and not one["limit"]}
    folder = RunDir(run).evaluation
    write_json(folder / "benchmarks.json", {"scores": scores, "results": records})
    text = table.render(records, str(run))
    write_atomically(folder / "benchmarks.md", text)
    print(text)
    if records:
        figures = {f"benchmark/{one['name']}/{one['images']}": one["score"] for one in records if not one["limit"]}
        columns: list[str | int] = ["benchmark", "images", "score", "questions", "limit"]
        log_scores(config, run, figures, "benchmarks", columns, [[one[str(key)] for key in columns] for one in records])


def main() -> int:
    """Run a suite, or bring its data."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    benchmarks, images = chosen(options)
    if options.fetch:
        return fetch(Environment.find(options.environment), benchmarks)
    if options.run is None:
        raise ConfigError("run=RUN: which run is to be measured?")
    run = Path(options.run)
    export = RunDir(run).export
    if not (export / "config.json").is_file():
        raise ConfigError(f"{run} has no export; finish its training first")
    environment = Environment.find(options.environment)
    config = configuration.load(RunDir(run).config, options.llm, options.vision)
    folder = RunDir(run).evaluation / "benchmarks"
    tasks = folder / "tasks"
    results = Results(folder, export)
    jobs.write_tasks(tasks, environment, benchmarks)
    wanted = [Job(name, one, shown, options.limit) for name, one in benchmarks.items() for shown in images]
    if options.split is not None:
        split = split_job(config, options.split, tasks, images[0], options.limit)
        wanted += [Job(split.name, split.benchmark, shown, options.limit) for shown in images]
    pending = [job for job in wanted if results.find(job) is None]
    print(f"{len(wanted) - len(pending)} of {len(wanted)} tasks are finished", flush=True)
    failed: list[str] = []
    with _stoppable():
        if pending:
            _require_data(environment, tasks, pending)
            failed = run_jobs(pending, run, environment, tasks, results, _moved(options), options.ranks)
    report(run, results, wanted, config)
    if failed:
        print(f"error: {len(failed)} of {len(pending)} tasks have no result; first: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


def _moved(options: Options) -> dict[str, str]:
    paths = {"llm": options.llm.path, "vision": options.vision.path}
    return {part: path for part, path in paths.items() if path is not None}


def _require_data(environment: Environment, tasks: Path, pending: Sequence[Job]) -> None:
    names = sorted({job.task for job in pending})
    wrong = environment.load_data(tasks, names, offline=True)
    if wrong:
        for name, error in wrong.items():
            print(f"{name.removeprefix('vlora_')}: {error}", file=sys.stderr)
        missing = ",".join(name.removeprefix("vlora_") for name in wrong)
        where = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise UserError(
            f"the data of {missing} are not in {where}; on a machine with internet that shares it: "
            f"python -m train.benchmark tasks={missing} fetch=true"
        )


if __name__ == "__main__":
    run_cli(main)
