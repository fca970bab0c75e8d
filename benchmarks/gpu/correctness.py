"""Part a: is it right on this device? The tests marked `gpu`, and two stages of training end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.part import Context

ROOT = Path(__file__).resolve().parents[2]


def tests(context: Context) -> None:
    """Every kernel, op, merge and a ZeRO-3 step against float64 or plain torch: `pytest -m gpu`, one row per file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        if find_spec("xdist") is not None and context.device.type == "cuda":
            command += ["-n", "6"]  # most of the time is Triton's compiler
        paths = ["tests/gpu", *([] if context.tiny else ["tests/model/decoder/test_norms.py"])]
        done = subprocess.run([*command, *paths], cwd=ROOT, env=_environment(context), capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
        rows: dict[str, dict[str, Any]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            row = rows.setdefault(case.get("classname", "?"), {"passed": 0, "failed": 0, "skipped": 0, "names": []})
            bad = case.find("failure") is not None or case.find("error") is not None
            kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            row[kind] += 1
            if bad:
                row["names"].append(case.get("name"))
        for name, row in rows.items():
            context.row(name, row if row["names"] else {k: v for k, v in row.items() if k != "names"})
        failed = sum(row["failed"] for row in rows.values())
        if failed or not rows:
            raise RuntimeError(f"{failed} tests failed: {done.stdout[-1500:]}")


def training(context: Context) -> None:
    """Pretraining, finetuning and evaluation of a tiny model through the commands a user types; colours as questions.

    The answer is in the image alone, so accuracy shows whether the image reaches the LLM. On a CPU the same commands
    give the accuracy to compare with (docs/gpu.md).
    """
    from tests.train import world

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = world.make(folder / "world")
        steps = 2 if context.tiny else 150
        common = ["launch.workers=1", "data.test=squares/val", "generator.init=stable", f"cache_dir={folder}/cache"]
        pretrain = world.overrides(home, folder / "pretrain", f"stage.steps={steps}", *common)
        finetune = world.overrides(
            home, folder / "finetune", f"stage.steps={2 * steps}", *common, "stage=finetune",
            f"init_from={folder}/pretrain", "optim.lr.llm=1e-3",
        )  # fmt: skip
        last = "pretrain" if context.tiny else "finetune"
        commands: dict[str, list[str]] = {"pretrain": ["train", *pretrain]}
        if not context.tiny:
            commands["finetune"] = ["train", *finetune]
        commands["evaluate"] = ["train.evaluate", f"run={folder}/{last}"]
        seconds = {}
        for step, arguments in commands.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=_environment(context),
                capture_output=True,
                text=True,
            )
            seconds[step] = time.perf_counter() - start
            if done.returncode != 0:
                raise RuntimeError(f"{step}: {done.stderr[-1500:]}")
            if step != "evaluate":
                losses = [json.loads(line) for line in (folder / step / "metrics.jsonl").read_text().splitlines()]
                losses = [r["loss"] for r in losses if "loss" in r]
                context.row(step, {"first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds[step]})
        found = json.loads((folder / last / "evaluation" / "test-real.json").read_text())
        accuracy = {kind: value["percent"] for kind, value in found["accuracy"].items()}
        context.row("evaluate", {**accuracy, "questions": found["count"], "seconds": seconds["evaluate"]})


def _environment(context: Context) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if context.device.type == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return environment
