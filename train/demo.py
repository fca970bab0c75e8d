"""`python -m train.demo --out DIR`: the whole pipeline on real parts, ending in a report (`make demo`).

Runs the very commands a user would type, one after another, and measures them from outside: wall seconds, core seconds
and the peak memory of all their processes together. A second call with the same folder goes on where the first
stopped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import resource
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from common.arguments import Parser, whole
from common.errors import UserError, run_cli
from common.files import read_json, write_atomically, write_json
from common.markdown import as_table
from model.connectors import CONNECTORS
from train import config as configuration
from train.config import DTYPES
from train.process import launch
from train.process.run_files import RunDir


@dataclass(frozen=True)
class Subject:
    """What a demo is about.

    Attributes:
        title: Of its report.
        prepare: Commands that make its data, by name.
        recipe: Folder of `conf/recipe` with SmolLM2's steps and rates for it; None: the LLM's own, which are for it.
        overrides: Further ones of both stages, which no recipe can hold.
        sizes: Sizes of the generator for SmolLM2 that differ from its preset.
        splits: Where it is tested; the first counts.
        questions: In each of them, unless `--questions` says how many.
    """

    title: str
    prepare: dict[str, tuple[str, ...]]
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)
    questions: int = 2000


SUBJECTS = {
    "easy_vqa": Subject("easy-VQA", {"data": ("data_prep", "source=easy_vqa")}),
    "scenes": Subject(
        "composed scenes",
        {
            "cut-outs": ("data_prep.parts.cutouts", "emoji"),
            "data": (
                *("data_prep", "source=scenes", "name=scenes", "workers=2"),
                *("source.style=google", "source.test_style=twitter"),
                # Few things, each often: what counts is how often a name is seen.
                *("source.names=6", "source.objects=2", "source.questions=8", "source.samples=2000"),
            ),
        },
        "scenes",
        ("vision.image_size=112",),  # at 56 an object has one or two patches
        ("generator.above=0.5",),  # what is below the first delta is not run backwards: a third of a step
        ("test", "scenes/test_objects", "scenes/test_style", "scenes/test_moved"),
        600,
    ),
}


class _PeakMemory(threading.Thread):
    """Samples the memory of a process and all its descendants, once a second or in a hundredth of the time.

    Proportional set size: pages that ranks share are counted once in all. The kernel walks all pages for it: once a
    second this took 7 % of a core beside two ranks of 3 GB.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid, self._done = pid, threading.Event()

    def run(self) -> None:
        pause = 1.0
        while not self._done.wait(pause):
            began = time.perf_counter()
            try:
                root = psutil.Process(self._pid)
                processes = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(_memory(p) for p in processes))
            pause = max(1.0, 100 * (time.perf_counter() - began))

    def stop(self) -> int:
        """Bytes at the peak."""
        self._done.set()
        self.join()
        return self.peak


def _memory(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return getattr(full, "pss", full.rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


_REMEDY = "remove it, and start the demo again: finished stages are kept"


class Steps:
    """Runs commands and keeps what each cost in `steps.json`.

    Args:
        file: Where the costs are kept; a step already in it is not run again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.costs: dict[str, dict[str, float]] = read_json(file, _REMEDY) if file.exists() else {}

    def run(self, name: str, *arguments: str) -> None:
        """Run `python -m arguments...` once.

        Raises:
            UserError: it failed.
        """
        if name in self.costs:
            print(f"== {name}: done before", flush=True)
            return
        print(f"== {name}: python -m {' '.join(arguments)}", flush=True)
        context: Any = multiprocessing.get_context(launch.start_method())
        start, before = time.perf_counter(), _child_seconds()
        process = context.Process(target=_run_module, args=arguments)
        process.start()
        memory = _PeakMemory(process.pid)
        memory.start()
        try:
            process.join()
        except KeyboardInterrupt:
            process.join()
            raise
        finally:
            peak = memory.stop()
        if process.exitcode:
            raise UserError(f"step '{name}' failed (exit code {process.exitcode}); the reason stands above")
        cost = {
            "seconds": time.perf_counter() - start,
            "core_seconds": _child_seconds() - before,
            "peak_gb": peak / 1e9,
        }
        self.costs[name] = cost
        write_json(self.file, self.costs)
        print(f"== {name}: {cost['seconds']:.0f} s, {cost['core_seconds']:.0f} core-s", flush=True)


def _run_module(module: str, *arguments: str) -> None:
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    sys.argv = [module, *arguments]
    run_cli(importlib.import_module(f"{module}.__main__" if is_package else module).main)


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Parse the command line and run the pipeline."""
    parser = Parser(prog="python -m train.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for runs and report")
    parser.add_argument("--data", default="easy_vqa", choices=list(SUBJECTS), help="what it learns to see")
    parser.add_argument("--connectors", nargs="+", default=["vlora"], choices=list(CONNECTORS))
    parser.add_argument("--llm", default="smollm2_135m", choices=["smollm2_135m", "tiny"])
    defaults = ", ".join(f"{subject.questions} of {name}" for name, subject in SUBJECTS.items())
    parser.add_argument(
        "--questions", type=whole(0), help=f"per split, a fixed random subset; 0: all; default: {defaults}"
    )
    parser.add_argument("overrides", nargs="*", help="further overrides for both stages, key=value")
    arguments = parser.parse_args()
    configuration.compose_overrides(arguments.overrides)  # a wrong word, before any work
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    steps = Steps(out / "steps.json")

    steps.run("parts", "data_prep.parts")
    for name, command in SUBJECTS[arguments.data].prepare.items():
        steps.run(name, *command)
    if arguments.llm == "tiny":
        steps.run("tiny llm", "data_prep.parts.tiny_llm", "--data", arguments.data)
    results: dict[str, Any] = {}
    for connector in arguments.connectors:
        results[connector] = _connector(connector, arguments, steps, out)
    return _report(arguments, steps, out, results, time.perf_counter() - started)


def precision(out: Path) -> str:
    """`bf16` where this machine is faster in it, else `fp32`; measured once per demo and kept in `out`.

    CPUs that know bf16 instructions need not be faster with them: without AMX, torch's bf16 products were measured 1.5
    to 1.8 times slower than fp32. So the products of a training step are timed in both, in turn, on one thread.
    """
    if torch.cuda.is_available():
        return "bf16"
    file = out / "precision.json"
    if not file.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a process with OpenMP threads could not be forked into workers
        seconds = {name: min(_product_seconds(dtype) for _ in range(3)) for name, dtype in DTYPES.items()}
        torch.set_num_threads(threads)  # commands that are forked from here begin with it
        # What is not a product costs the same or more in bf16, so it has to win clearly.
        chosen = "bf16" if seconds["bf16"] < 0.8 * seconds["fp32"] else "fp32"
        write_json(file, {"chosen": chosen, "product_seconds": seconds})
        print(f"precision: {chosen} (products: fp32 {seconds['fp32']:.3f} s, bf16 {seconds['bf16']:.3f} s)", flush=True)
    return read_json(file, _REMEDY)["chosen"]


def _product_seconds(dtype: torch.dtype, tokens: int = 1024, width: int = 576, inner: int = 1536) -> float:
    """CPU seconds of one MLP projection's three products (forward and both gradients), ten times; SmolLM2's shapes."""
    x, weight, gradient = (
        torch.randn(*shape, dtype=dtype) for shape in ((tokens, width), (inner, width), (tokens, inner))
    )
    start = time.process_time()
    for _ in range(10):
        x @ weight.T
        gradient @ weight
        gradient.T @ x
    return time.process_time() - start


def overrides(data: str, llm: str, connector: str, stage: str) -> list[str]:
    """What a demo adds to `python -m train` for one stage, wherever it runs.

    A subject's recipe is for SmolLM2; the test LLM keeps its own, with the subject's data.
    """
    subject = SUBJECTS[data]
    words = [f"stage={stage}", f"connector={connector}", f"llm={llm}", *subject.overrides]
    if llm == "tiny":
        own = [] if subject.recipe is None else [f"data.name={data}", f"llm.path=${{cache_dir}}/llm/tiny-llama-{data}"]
        return words + own
    if subject.recipe is not None:
        words.append(f"recipe={subject.recipe}/{stage}")
    words += subject.sizes
    if stage == "finetune":  # the LLM's gradients are most of what crosses the ranks
        words.append("engine.reduce_dtype=bf16")
    return words


def _connector(connector: str, arguments: argparse.Namespace, steps: Steps, out: Path) -> dict[str, Any]:
    """Both stages and the evaluations of one connector."""
    subject = SUBJECTS[arguments.data]
    asked = subject.questions if arguments.questions is None else arguments.questions
    runs = {stage: out / connector / stage for stage in ("pretrain", "finetune")}
    for stage, run in runs.items():
        words = overrides(arguments.data, arguments.llm, connector, stage)
        if stage == "finetune":
            words.append(f"init_from={runs['pretrain']}")
        if arguments.llm != "tiny":  # too small to gain from it
            words.append(f"engine.precision={precision(out)}")
        steps.run(f"{stage} {connector}", "train", f"run_dir={run}", *words, *arguments.overrides)
    evaluation: dict[str, dict[str, Any]] = {split: {} for split in subject.splits}
    for split in subject.splits:
        # Half as many questions tell whether the control falls to the floor.
        for images, questions in (("real", asked), ("shuffled", asked // 2)):
            limit = [f"max_samples={questions}"] if questions else []
            where = "" if split == subject.splits[0] else f" on {split}"
            name = f"evaluate {connector}{where}" + ("" if images == "real" else ", wrong image")
            steps.run(name, "train.evaluate", f"run={runs['finetune']}", f"split={split}", f"images={images}", *limit)
            file = RunDir(runs["finetune"]).evaluation / f"{split.replace('/', '-')}-{images}.json"
            evaluation[split][images] = read_json(file, _REMEDY)
    return {"runs": runs, "evaluation": evaluation}


def _report(arguments: argparse.Namespace, steps: Steps, out: Path, results: dict[str, Any], seconds: float) -> int:
    from train.measure import plots, report
    from train.measure.results import load, run_identity, stage_figures

    first = next(iter(results.values()))
    config = configuration.load(RunDir(first["runs"]["finetune"]).config)
    subject = SUBJECTS[arguments.data]
    tested = {c: v["evaluation"][subject.splits[0]] for c, v in results.items()}
    floor = next(iter(tested.values()))["real"]["blind_floor"]
    stages = {c: {s: stage_figures(r) for s, r in v["runs"].items()} for c, v in results.items()}
    summary = {
        "llm": config.llm.path,
        "vision": config.vision.path,
        "connectors": {
            c: {"stages": stages[c], "evaluation": tested[c], "splits": v["evaluation"]} for c, v in results.items()
        },
        "blind_floor": floor,
        "steps": steps.costs,
        "seconds_without_setup": seconds,
        "peak_gb": max(cost["peak_gb"] for cost in steps.costs.values()),
        **run_identity(first["runs"]["finetune"]),
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    plots.step_time(
        {f"{c} {s}": f["step_seconds"] for c, v in stages.items() for s, f in v.items()}, out / "step_time.png"
    )
    runs = load([run for value in results.values() for run in value["runs"].values()])
    file = report.write(out, runs, f"VLoRA on {subject.title}", _cost(stages, steps.costs))
    overall = {c: each["real"]["accuracy"]["overall"]["percent"] for c, each in tested.items()}
    for connector, percent in overall.items():
        print(f"{connector}: {percent:.1f} % overall, blind floor {floor['overall']['percent']:.1f} %")
    print(f"report: {file}")
    return 0


def _cost(stages: dict[str, dict[str, dict[str, Any]]], costs: dict[str, dict[str, float]]) -> list[str]:
    """The report's section on what every step of the demo cost."""
    lines = ["## Cost", "", f"All steps: {sum(cost['seconds'] for cost in costs.values()) / 60:.1f} minutes.", ""]
    table = [["step", "wall s", "core s", "peak GB", "samples/s", "tokens/s", "padding", "without packing"]]
    trained = {f"{s} {c}": figures for c, value in stages.items() for s, figures in value.items()}
    for name, cost in costs.items():
        cells = [f"{cost['seconds']:.0f}", f"{cost['core_seconds']:.0f}", f"{cost['peak_gb']:.2f}"]
        if figures := trained.get(name):
            cells += [f"{figures['samples_per_s']:.1f}", f"{figures['tokens_per_s']:.0f}"]
            cells += [f"{figures[key]:.1%}" for key in ("padding_fraction", "padding_fraction_of_rows")]
        table.append([name, *cells, *[""] * (7 - len(cells))])
    lines += [as_table(table), "", "![step time](step_time.png)", ""]
    if any(figures["vision_features_cached"] for figures in trained.values()):
        lines.append("The frozen encoder's features are computed once and cached (`vision.cache=true`), so the step's")
        lines += ["vision time is zero; the first stage pays for the cache.", ""]
    return lines


if __name__ == "__main__":
    run_cli(main)
