"""A small world for whole runs: random models and a data set, all in their real formats, made in seconds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, LlamaConfig, LlamaForCausalLM

from data_prep.schema import Sample, write_split
from data_prep.tiny_llm import build_tokenizer

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
        "data.batch_size=8",
        "data.dialogues_per_sample=2",
        "generator.width=16",
        "generator.num_heads=2",
        "generator.rank=4",
        "engine.persistence_threshold=0",
        "tracking.wandb=disabled",
        "launch.threads_per_worker=1",
        f"run_dir={run}",
        *more,
    ]


def start(arguments: list[str], module: str = "train", **environment: str) -> subprocess.Popen:
    """`python -m train ...` in its own session, as a user would start it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train(arguments: list[str], module: str = "train", timeout: float = 240, **environment: str):
    """Run to the end; the finished process with its output."""
    process = start(arguments, module, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def steps_done(run: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Poll until `condition()`; fails when the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the front end and all its workers, which live in sessions of their own."""
    import psutil

    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        member.kill()
    psutil.wait_procs(tree, timeout=10)
    process.communicate()
