"""`python -m benchmarks.inference`: what an answer about an image costs, for every way to show it to the same LLM.

    python -m benchmarks.inference llm=.cache/llm/smollm2-135m-instruct vision=.cache/vision/dinov2-s14
    python -m benchmarks.inference ... tokens=576 text=32,128,512 questions=1,8,32 batch=1,16 ranks=16,64

Modes: the plain LLM without an image, the branch (weights beside the model), merged (weights folded in), and `mlp`
(visual tokens in the input, `tokens` of them, of random features). Weights are random where nothing was trained: time
does not depend on their values. Every row is the median of `repeats`, all modes in turn in each repeat, in one process.
Prints ratios to the plain LLM first; writes `out` as JSON. Figures are only worth reading from a quiet machine.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import ConfigError, run_cli
from common.options import parse_options
from common.settings import setting
from model.config import ConnectorConfig, GeneratorConfig, LLMConfig, ModelConfig, VisionConfig
from model.deploy.merging import merged
from model.generator.weights import PerceptualWeights
from model.vlm import VisionLanguageModel, build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        llm, vision: Folders of the parts.
        ranks: Of the deltas, with commas between.
        types: Where they go.
        every: In every n-th layer.
        tokens: Visual tokens of an image for `mlp`.
        text: Lengths of a question, tokens.
        questions: About one image.
        batch: Rows together.
        new: Tokens of an answer.
        repeats: Of every measurement.
        threads: Of torch; null: its own choice.
        precision: `fp32` or `bf16`.
        device: Where.
        out: File of the figures; null: none.
    """

    llm: str = ".cache/llm/smollm2-135m-instruct"
    vision: str = ".cache/vision/dinov2-s14"
    ranks: str = "16,64"
    types: str = "qkvom"
    every: int = setting(3, within="[1, 1000]")
    tokens: int = setting(576, within="[1, 100000]")
    text: str = "32,128,512"
    questions: str = "1,8,32"
    batch: str = "1,16"
    new: int = setting(32, within="[2, 10000]")
    repeats: int = setting(5, within="[1, 1000]")
    threads: int | None = setting(1, within="[1, 1024]")
    precision: str = setting("bf16", choices=("fp32", "bf16"))
    device: str = setting("cpu", choices=("cpu", "cuda"))
    out: str | None = None


def numbers(key: str, text: str) -> list[int]:
    """`"1,8"` -> [1, 8].

    Raises:
        ConfigError: something else than whole numbers, at least 1.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"{key}={text}: give whole numbers with commas, each at least 1")
    return [int(part) for part in text.split(",")]


def build(options: Options, rank: int) -> VisionLanguageModel:
    """The model with deltas of size as after training."""
    config = ModelConfig(
        LLMConfig(path=options.llm),
        VisionConfig(path=options.vision, layer=-1, image_size=56),
        GeneratorConfig(num_blocks=1, width=64, num_heads=4, rank=rank, every=options.every, types=options.types),
        ConnectorConfig(),
    )
    model = build_model(config, DTYPES[options.precision]).to(options.device).eval()
    for factors in model.connector.generator.output_factors.values():
        torch.nn.init.normal_(factors.weight, std=0.01)
    return model


@dataclass
class Case:
    """What is measured together: rows, tokens of the question and of the answer."""

    rows: int
    text: int
    new: int


@torch.no_grad()
def answer(llm: Any, case: Case, weights: PerceptualWeights | None, visual: Tensor | None) -> dict[str, float]:
    """One answer to every row: seconds to the first token, seconds per later token, bytes of keys and values."""
    device = llm.device
    ids = torch.randint(5, min(1000, llm.config.get_text_config().vocab_size), (case.rows, case.text), device=device)
    cache = DynamicCache()
    more: dict[str, Any] = {} if weights is None else {"perceptual_weights": weights}
    started = time.perf_counter()
    if visual is None:
        out = llm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    else:
        embedded = torch.cat([visual.expand(case.rows, -1, -1), llm.get_input_embeddings()(ids)], dim=1)
        out = llm(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(case.new - 1):
        out = llm(input_ids=token, past_key_values=cache, use_cache=True, **more)
        token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    later = (time.perf_counter() - started) / (case.new - 1)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "first": first,
        "token": later,
        "kv_bytes": kept,
        "prefix_bytes": kept / (case.rows * cache.get_seq_length()),
    }


def measure(model: VisionLanguageModel, options: Options, case: Case) -> dict[str, dict[str, float]]:
    """All modes in turn, medians over the repeats."""
    llm, dtype = model.llm, model.llm.dtype
    assert model.vision is not None
    size, width = model.vision.image_size, llm.config.get_text_config().hidden_size
    pixels = torch.randn(1, 3, size, size, device=llm.device, dtype=dtype)
    owner = torch.zeros(1, dtype=torch.int64, device=llm.device)
    visual = torch.randn(1, options.tokens, width, device=llm.device, dtype=dtype) * 0.02

    @torch.no_grad()
    def encode() -> PerceptualWeights:
        features = model.encode(pixels).to(dtype)
        weights = model.connector(features, owner, torch.ones(1, device=llm.device), 1).weights
        return weights.for_rows(None)

    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in ("plain", "branch", "merged", "mlp")}
    for number in range(options.repeats + 1):
        started = time.perf_counter()
        weights = encode()
        encoding = time.perf_counter() - started
        rows = {
            "plain": answer(llm, case, None, None),
            "branch": answer(llm, case, weights, None) | {"once": encoding},
            "mlp": answer(llm, case, None, visual),
        }
        started = time.perf_counter()
        with merged(llm, weights, 0):
            merging = time.perf_counter() - started
            rows["merged"] = answer(llm, case, None, None) | {"once": encoding + merging}
        if number:  # the first warms up
            for mode, row in rows.items():
                found[mode].append(row)
    return {mode: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for mode, rows in found.items()}


def describe(rank: int, case: Case, found: dict[str, dict[str, float]], questions: list[int], tokens: int) -> list[str]:
    """Ratios to the plain LLM, a line per mode."""
    plain, lines = found["plain"], []
    for mode, row in found.items():
        per_image = row["prefix_bytes"] * tokens if mode == "mlp" else 0
        whole = [
            (row.get("once", 0.0) + n * (row["first"] + (case.new - 1) * row["token"]))
            / (n * (plain["first"] + (case.new - 1) * plain["token"]))
            for n in questions
        ]
        ratios = " ".join(f"{value:>7.2f}" for value in whole)
        lines.append(
            f"{rank:>4} {case.rows:>5} {case.text:>5} {mode:<7} {plain['token'] / row['token']:>8.3f} "
            f"{row['first'] / plain['first']:>8.2f} {row['first'] * 1e3:>9.1f} {case.rows / row['token']:>9.1f} "
            f"{per_image / 2**20:>8.2f}  {ratios}"
        )
    return lines


def main() -> int:
    """Measure, print, write."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ranks, batch, lengths, questions = (
        numbers(key, getattr(options, key)) for key in ("ranks", "batch", "text", "questions")
    )
    if options.out is not None and (Path(options.out).is_dir() or not Path(options.out).parent.is_dir()):
        raise ConfigError(f"out={options.out}: give a file in a folder that is there")
    records = []
    asked = " ".join(f"x{n:<6}" for n in questions)
    print(
        "decode: tokens/s over the plain LLM's; first: time to first token over it; xN: N questions, encoding included"
    )
    print(f"rank  rows  text mode      decode    first  first ms  tokens/s  KV MiB  {asked}")
    for rank in ranks:
        model = build(options, rank)
        for rows in batch:
            for text in lengths:
                case = Case(rows, text, options.new)
                found = measure(model, options, case)
                print("\n".join(describe(rank, case, found, questions, options.tokens)), flush=True)
                records.append({"rank": rank} | asdict(case) | {"modes": found})
        del model
    peak = psutil.Process().memory_info().rss
    if options.out is not None:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "rss": peak}
        Path(options.out).write_text(
            json.dumps({"options": asdict(options), "machine": machine, "cases": records}, indent=1)
        )
    print(f"resident memory at the end: {peak / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    run_cli(main)
