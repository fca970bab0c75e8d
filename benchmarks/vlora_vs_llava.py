"""Table 7 of the paper, through the whole product: training speed of every connector on the same data.

    python -m benchmarks.vlora_vs_llava                                      both stages, 64 to 576 visual tokens
    python -m benchmarks.vlora_vs_llava --tokens 576 --stages pretrain --steps 6
    python -m benchmarks.vlora_vs_llava --llm tiny --tokens 16 --steps 3     tries the script itself

Each figure is a run of `python -m train` on the real engine and loader, ZeRO-3 on two ranks: the same LLM, the same
texts (captions of 48 tokens, conversations of 260) and the same cached features of the built-in encoder, on images of
as many patches; only the connector differs. `mlp` puts all patches into the input, `qformer` a quarter as many tokens,
`vlora` and `crossattn` none. A step is one micro-batch a rank, of as many samples as `--positions` of the LLM's input
hold, as one who fills a GPU would: without visual tokens more samples fit, and ZeRO-3 gathers the weights less often.
Rounds go through all connectors in turn, so that a busy machine slows all alike; the median step of all rounds counts.
The last column is how much of the FLOPs that a connector saves against `mlp` became time: the ratio of the times of a
sample over that of its FLOPs. Wall time: only a quiet machine gives figures worth writing down.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from common.errors import UserError, run_cli
from common.places import checkout
from data_prep.store.sample import Sample
from data_prep.store.writer import write_split
from train.config import compose_overrides, resolve
from train.engine.engine import freeze
from train.measure.flops import FlopCounter
from train.measure.tracking import read_metrics

CONNECTORS = ("mlp", "qformer", "crossattn", "vlora")
TEXT = {"pretrain": 48, "finetune": 260}
RANKS = 2
WARM_UP = 2
"""First steps of a run that do not count: they allocate, and ZeRO-3 learns the order in which weights are wanted."""
WORDS = ("the", "a", "red", "blue", "green", "small", "large", "circle", "square", "is", "on", "of", "near", "left")


@dataclass
class Figures:
    """Of one connector at one point, over all rounds.

    Attributes:
        seconds: Of every step that counts.
        peak_gib: Largest memory of a rank.
        samples: Of one step.
        flops: Of one step.
    """

    seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    samples: int = 0
    flops: float = 0.0


def write_data(root: Path, samples: int, seed: int = 0) -> None:
    """Noise images with texts of made-up words: split `caption` and split `conversation`."""
    rng = np.random.default_rng(seed)
    images = [_png(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(samples)]

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    def made(number: int, question: str, answer: str) -> Sample:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Sample(str(number), [images[number]], [turns], "made up")

    write_split(root / "made_up" / "caption", [made(n, "", text(TEXT["pretrain"] - 2)) for n in range(samples)])
    half = TEXT["finetune"] // 2
    write_split(root / "made_up" / "conversation", [made(n, text(half), text(half - 4)) for n in range(samples)])


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows(connector: str, stage: str, tokens: int, positions: int) -> int:
    """Samples of a rank's micro-batch: as many as have at most `positions` in the LLM's input together."""
    one = TEXT[stage] + {"mlp": tokens, "qformer": queries(tokens)}.get(connector, 0)
    return max(1, positions // one)


def queries(tokens: int) -> int:
    """Visual tokens that a Q-Former makes of so many."""
    return max(1, tokens // 4)


def overrides(
    options: argparse.Namespace, connector: str, stage: str, tokens: int, batch: int, folder: Path
) -> list[str]:
    """The run of one connector, `batch` samples a rank and step."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"--tokens {tokens}: an image has a square of patches; give 16, 64, 144, 256 or 576")
    split = "caption" if stage == "pretrain" else "conversation"
    start = [f"init_from={folder / f'{connector}-{tokens}-pretrain-0'}"] if stage == "finetune" else []
    return [
        f"llm={options.llm}", f"connector={connector}", f"connector.num_queries={queries(tokens)}",
        f"stage={stage}", *start,
        f"vision.image_size={14 * side}", "vision.image_mode=resize", "vision.keep_cls=false", "vision.cache=true",
        f"data.root={folder / 'data'}", f"data.train=[{{path: made_up/{split}, weight: 1.0}}]", "data.val=null",
        "data.test=null", f"data.batch_size={RANKS * batch}", f"engine.micro_batch_size={batch}",
        "data.dialogues_per_sample=null", "data.template=bare", "data.group_by=none",
        f"stage.steps={options.steps + WARM_UP}", "stage.epochs=null", "stage.freeze_lower=false",
        "llm.pack_tokens=null", "engine.gradient_checkpointing=false", "engine.zero_stage=3", f"launch.workers={RANKS}",
        "tracking.wandb=disabled", "tracking.log_every=1", "tracking.weights_every=100000", "checkpoint.every=null",
    ]  # fmt: skip


def step_flops(words: list[str], stage: str, batch: int) -> float:
    """FLOPs of a step, the encoder left out: its features are cached."""
    from model.vision import build_vision
    from model.vlm import build_model

    config = resolve(compose_overrides(words))
    encoder = build_vision(config.vision, torch.float32, meta=True)
    model = build_model(config.model, torch.float32, meta=True, vision=encoder)
    freeze(model, config.stage)
    targets = TEXT[stage] if stage == "pretrain" else TEXT[stage] // 2
    return FlopCounter(model, features_cached=True).step(batch, TEXT[stage] * batch, targets * batch, batch).total


def run(words: list[str], run_dir: Path) -> tuple[list[float], float]:
    """Seconds of the steps that count, and the largest memory of a rank, GiB.

    Raises:
        UserError: the run failed.
    """
    command = [sys.executable, "-m", "train", *words, f"run_dir={run_dir}"]
    done = subprocess.run(command, cwd=checkout("the benchmark"), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    records = [record for record in read_metrics(run_dir) if "loss" in record]
    ends = [0.0, *(record["seconds"] for record in records)]
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    device = any("memory/device_peak_gib" in record for record in records)
    name = "memory/device_peak_gib" if device else "memory/host_peak_gib"
    peak = max(record.get(name, 0.0) for record in records)
    return seconds[WARM_UP:], peak


def measure(options: argparse.Namespace, folder: Path) -> dict[tuple[str, int], dict[str, Figures]]:
    """Figures of every connector, by stage and visual tokens."""
    write_data(folder / "data", samples=RANKS * rows("vlora", "pretrain", 0, options.positions))
    found: dict[tuple[str, int], dict[str, Figures]] = defaultdict(lambda: {c: Figures() for c in CONNECTORS})
    for tokens in options.tokens:
        for stage in ("pretrain", "finetune"):
            if stage not in options.stages and "finetune" not in options.stages:
                continue
            # Stage 2 starts from what stage 1 exports; where only stage 2 is asked for, one short round makes it.
            rounds = options.rounds if stage in options.stages else 1
            for number in range(rounds):
                for connector in CONNECTORS:
                    batch = rows(connector, stage, tokens, options.positions)
                    words = overrides(options, connector, stage, tokens, batch, folder)
                    seconds, peak = run(words, folder / f"{connector}-{tokens}-{stage}-{number}")
                    if stage in options.stages:
                        one = found[stage, tokens][connector]
                        one.seconds += seconds
                        one.peak_gib = max(one.peak_gib, peak)
                        one.samples = RANKS * batch
                        one.flops = step_flops(words, stage, one.samples)
    return found


def report(found: dict[tuple[str, int], dict[str, Figures]]) -> tuple[str, list[dict[str, Any]]]:
    """The table, and its rows for JSON."""
    lines = [
        f"{'stage':<10}{'tokens':>7}  {'connector':<11}{'batch':>6}{'samples/s':>10}{'GiB':>7}{'GFLOPs':>9}"
        f"{'FLOPs x':>9}{'time x':>8}{'share':>7}"
    ]
    table = []
    for (stage, tokens), figures in found.items():
        speeds = {name: one.samples / median(one.seconds) for name, one in figures.items()}
        costs = {name: one.flops / one.samples for name, one in figures.items()}
        for name, one in figures.items():
            fewer, faster = costs["mlp"] / costs[name], speeds[name] / speeds["mlp"]
            table.append(
                {
                    "stage": stage,
                    "visual_tokens": tokens,
                    "connector": name,
                    "samples_of_a_step": one.samples,
                    "samples_per_s": speeds[name],
                    "seconds": one.seconds,
                    "peak_gib": one.peak_gib,
                    "gflops_per_sample": costs[name] / 1e9,
                    "fewer_flops": fewer,
                    "less_time": faster,
                    "share": faster / fewer,
                }
            )
            lines.append(
                f"{stage:<10}{tokens:>7}  {name:<11}{one.samples:>6}{speeds[name]:>10.2f}{one.peak_gib:>7.2f}"
                f"{costs[name] / 1e9:>9.1f}{fewer:>9.2f}{faster:>8.2f}{faster / fewer:>7.0%}"
            )
    return "\n".join(lines), table


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vlora_vs_llava", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--llm", default="smollm2_135m", help="a preset of conf/llm whose weights are here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 144, 256, 576])
    parser.add_argument("--stages", nargs="+", choices=list(TEXT), default=list(TEXT))
    parser.add_argument("--positions", type=int, default=2560, help="of a rank's micro-batch at most; 2560 take 6 GiB")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlora-vs-llava-") as folder:
        found = measure(options, Path(folder))
    text, table = report(found)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    run_cli(main)
