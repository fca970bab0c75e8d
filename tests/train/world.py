"""A small world for whole runs: random models and a data set, all in their real formats, made in seconds."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, LlamaConfig, LlamaForCausalLM

from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.store.sample import Sample
from data_prep.store.writer import write_split

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 180, 20), "black": (5, 5, 5)}


def picture(color: tuple[int, int, int], size: int = 28) -> bytes:
    """A PNG file of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    """One turn of each role."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def samples(count: int) -> list[Sample]:
    """Coloured squares with a question each; every fifth sample is text only."""
    out = []
    for i in range(count):
        name, color = list(COLORS.items())[i % len(COLORS)]
        shade = tuple(min(255, c + i % 7) for c in color)
        images = [] if i % 5 == 4 else [picture(shade)]
        talk = [dialogue("what color is the shape?", name), dialogue(f"is there a {name} shape?", "yes")]
        out.append(Sample(f"square/{i}", images, talk, "squares"))
    return out


def make(folder: Path, seed: int = 0) -> Path:
    """Models and data below `folder`."""
    torch.manual_seed(seed)
    texts = ["Question: Answer: what color is the shape? is there a red blue green black shape? yes no"]
    tokenizer = build_tokenizer(texts)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), num_hidden_layers=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
        )
    )
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    AutoModel.from_config(vision).save_pretrained(folder / "vision")
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 28},
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(processor))
    write_split(folder / "data" / "squares" / "train", samples(40))
    write_split(folder / "data" / "squares" / "val", samples(6))
    return folder


def overrides(world: Path, run: Path, *more: str) -> list[str]:
    """Command-line overrides of a short run in this world, two ranks, ZeRO-3, nothing persistent."""
    return [
        "llm=tiny",
        f"llm.path={world}/llm",
        f"vision.path={world}/vision",
        "vision.image_size=28",
        "vision.cache=false",
        f"cache_dir={world}/cache",
        f"data.root={world}/data",
        "data.train=[{path: squares/train, weight: 1.0}]",
        "data.val=null",
        "data.test=null",
        "data.batch_size=8",
        "data.dialogues_per_sample=2",
        "generator.types=qkvom",  # the paper's: m takes other ways than the projections
        "generator.width=16",
        "generator.num_heads=2",
        "generator.rank=4",
        "engine.persistence_threshold=0",
        "tracking.wandb=disabled",
        "launch.threads_per_worker=1",
        f"run_dir={run}",
        *more,
    ]


class Command:
    """`python -m MODULE ARGUMENTS...` in its own session, as a user would start it.

    Except that the process is a fork of one that has done the imports: ten seconds of every start.
    """

    def __init__(self, module: str, arguments: list[str], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._process = _imported().Process(target=_run, args=(module, arguments, environment, *self._files))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended.

        Raises:
            TimeoutError: it has not, after so many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"still running after {timeout} s")
        return tuple(file.read_text() for file in self._files)


@functools.cache
def _imported() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # The last one is what DeepSpeed imports when an engine is made: all of torch's compiler, half of a start.
    compiler = "deepspeed.runtime.zero.muon.muon_optimizer"
    # And this file, which every process imports to find `_run`.
    context.set_forkserver_preload(["train.__main__", "train.engine.stage", "train.evaluate", compiler, __name__])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is imported
        multiprocessing.forkserver.ensure_running()
    return context


def _run(module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    os.environ |= environment
    tempfile.tempdir = None  # found before the fork; TMPDIR is the caller's to say
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    if plan := environment.get("CHAOS"):  # where this process or one of its ranks is to be killed
        from tests.chaos import points

        points.arm(json.loads(plan))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(arguments: list[str], module: str = "train", **environment: str) -> Command:
    """Start `python -m train ...`."""
    return Command(module, arguments, environment)


def train(arguments: list[str], module: str = "train", timeout: float = 900, **environment: str):
    """Run to the end; the finished process with its output."""
    process = start(arguments, module, **environment)
    try:
        out, err = process.wait(timeout)
    except TimeoutError:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess([module, *arguments], process.returncode, out, err)


def steps_done(run: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(condition, process: Command, seconds: float = 600) -> None:
    """Poll until `condition()`; fails when the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.returncode is None, process.wait()
        if time.monotonic() > end:
            kill_tree(process)
            raise AssertionError(f"waited too long: {process.wait()}")
        time.sleep(0.02)


def kill_tree(process: Command) -> None:
    """SIGKILL to the front end and all its workers."""
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=60)
    process.wait(60)
