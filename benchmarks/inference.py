"""`python -m benchmarks.inference`: what an answer about an image costs, for every way to show it to the same LLM.

    python -m benchmarks.inference llm=.cache/llm/smollm2-135m-instruct vision=.cache/vision/dinov2-s14
    python -m benchmarks.inference ... tokens=576 text=32,128,512 questions=1,8,32 batch=1,16 ranks=16,64

Modes: the plain LLM without an image, the branch (weights beside the model), merged (weights folded in), and `mlp`
(visual tokens in the input, `tokens` of them, of random features). Weights are random where nothing was trained: time
does not depend on their values. All modes run in turn in each repeat, in one process; a row holds medians of what each
repeat gives as ratio to its own plain LLM. On one CPU thread it is the process' CPU time that is measured, so that
others on the machine disturb little. A case is repeated until its share of `seconds` is over.

Columns: `decode`, tokens/s over the plain LLM's; `first`, time to the first token over the plain LLM's, and the same in
`flops` of the language model; `reach`, how much of the FLOPs ratio to `mlp` the time to the first token reaches; `xN`,
time of N questions about one image over the plain LLM's, encoding (and merging) once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
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
from model.decoder.injection import without_deltas
from model.deploy.merging import merged
from model.generator.weights import PerceptualWeights
from model.ops import MERGEABLE
from model.vlm import VisionLanguageModel, build_model
from train.measure.flops import FlopCounter

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
        seconds: Of the whole run, about: every case is measured once, and again while its share lasts.
        threads: Of torch; null: its own choice.
        precision: `fp32` or `bf16`.
        device: Where.
        out: File of the figures; null: none.
    """

    llm: str = ".cache/llm/smollm2-135m-instruct"
    vision: str = ".cache/vision/dinov2-s14"
    ranks: str = "16,64"
    types: str = "qkvom"
    every: int = setting(4, within="[1, 1000]")
    tokens: int = setting(576, within="[1, 100000]")
    text: str = "32,128,512"
    questions: str = "1,8,32"
    batch: str = "1,16"
    new: int = setting(32, within="[2, 10000]")
    seconds: float = setting(420.0, within="[0, 1e6]")
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


@dataclass(frozen=True)
class Case:
    """What is measured together: rows, tokens of the question and of the answer."""

    rows: int
    text: int
    new: int


Row = dict[str, float]
"""Of one answer: seconds to the `first` token and per later `token`, bytes of keys and values per position (`kv`), and
seconds spent `once` per image."""


def clock(device: torch.device) -> Callable[[], float]:
    """CPU time where that is what an answer takes, else wall time."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@torch.no_grad()
def answer(llm: Any, case: Case, weights: PerceptualWeights | None = None, visual: Tensor | None = None) -> Row:
    """One answer to every row."""
    device = llm.device
    now = clock(device)
    ids = torch.randint(5, min(1000, llm.config.get_text_config().vocab_size), (case.rows, case.text), device=device)
    cache = DynamicCache()
    more: dict[str, Any] = {} if weights is None else {"perceptual_weights": weights}
    started = now()
    if visual is None:
        out = llm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    else:
        embedded = torch.cat([visual.expand(case.rows, -1, -1), llm.get_input_embeddings()(ids)], dim=1)
        out = llm(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    first = now() - started
    started = now()
    for _ in range(case.new - 1):
        out = llm(input_ids=token, past_key_values=cache, use_cache=True, **more)
        token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    later = (now() - started) / (case.new - 1)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"first": first, "token": later, "kv": kept / (case.rows * cache.get_seq_length()), "once": 0.0}


@torch.no_grad()
def repeat(models: dict[int, VisionLanguageModel], tokens: int, case: Case) -> dict[str, Row]:
    """Every mode once: `plain`, `mlp`, and `branch RANK` and `merged RANK` for each model."""
    first = next(iter(models.values()))
    llm, device, dtype = first.llm, first.llm.device, first.llm.dtype
    now = clock(device)
    assert first.vision is not None and first.placement is not None
    size = first.vision.image_size
    pixels = torch.randn(1, 3, size, size, device=device, dtype=dtype)
    owner = torch.zeros(1, dtype=torch.int64, device=device)
    visual = torch.randn(1, tokens, llm.config.get_text_config().hidden_size, device=device, dtype=dtype) * 0.02
    with without_deltas(llm, first.placement):  # its own classes: the plain LLM
        found = {"plain": answer(llm, case), "mlp": answer(llm, case, visual=visual)}
    for rank, model in models.items():
        started = now()
        conditioning = model.connector(model.encode(pixels).to(dtype), owner, torch.ones(1, device=device), 1)
        assert conditioning.weights is not None
        weights = conditioning.weights.for_rows(None)
        encoding = now() - started
        found[f"branch {rank}"] = answer(model.llm, case, weights) | {"once": encoding}
        started = now()
        with merged(model.llm, weights, 0):
            merging = now() - started
            found[f"merged {rank}"] = answer(model.llm, case) | {"once": encoding + merging}
    return found


def prefill_flops(models: dict[int, VisionLanguageModel], tokens: int, text: int) -> dict[str, float]:
    """Of the language model up to the first token of one row, by mode."""
    plain = FlopCounter(next(iter(models.values())), features_cached=True).prefill
    found = {"plain": plain(text), "mlp": plain(text + tokens)}
    for rank, model in models.items():
        connector = model.connector
        assert connector.placement is not None
        beside = sum(2.0 * (s.d_in + s.d_out) * rank for s in connector.placement.sites if s.type not in MERGEABLE)
        found[f"branch {rank}"] = plain(text) + text * connector.decoder_flops()
        found[f"merged {rank}"] = plain(text) + text * beside
    return found


def table(
    case: Case, repeats: list[dict[str, Row]], flops: dict[str, float], questions: list[int], tokens: int
) -> list[str]:
    """A line per mode."""
    lines = []
    for mode in repeats[0]:

        def ratio(value: Callable[[Row], float], mode: str = mode, to: str = "plain") -> float:
            return statistics.median(value(each[mode]) / value(each[to]) for each in repeats)

        def whole(n: int, mode: str = mode) -> float:
            later = case.new - 1
            return statistics.median(
                (each[mode]["once"] + n * (each[mode]["first"] + later * each[mode]["token"]))
                / (n * (each["plain"]["first"] + later * each["plain"]["token"]))
                for each in repeats
            )

        row = {key: statistics.median(each[mode][key] for each in repeats) for key in repeats[0][mode]}
        reach = flops[mode] / flops["mlp"] / ratio(lambda r: r["first"], to="mlp")
        visual = row["kv"] * tokens / 2**20 if mode == "mlp" else 0.0
        lines.append(
            f"{case.rows:>4} {case.text:>5} {mode:<10} {1 / ratio(lambda r: r['token']):>7.3f} "
            f"{ratio(lambda r: r['first']):>7.2f} {flops[mode] / flops['plain']:>7.2f} {reach:>6.2f} "
            f"{row['first'] * 1e3:>9.1f} {case.rows / row['token']:>9.1f} {visual:>7.2f}  "
            + " ".join(f"{whole(n):>7.2f}" for n in questions)
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
    models = {rank: build(options, rank) for rank in ranks}
    cases = [Case(rows, text, options.new) for rows in batch for text in lengths]
    repeat(models, 8, Case(1, 8, 2))  # warms up
    asked = " ".join(f"x{n:<6}" for n in questions)
    print(f"rows  text mode        decode   first   flops  reach  first ms  tokens/s  KV MiB  {asked}")
    records, began = [], time.perf_counter()
    for number, case in enumerate(cases):
        found = [repeat(models, options.tokens, case)]
        while time.perf_counter() < began + options.seconds * (number + 0.8) / len(cases):
            found.append(repeat(models, options.tokens, case))
        flops = prefill_flops(models, options.tokens, case.text)
        print("\n".join(table(case, found, flops, questions, options.tokens)), f"  ({len(found)} repeats)", flush=True)
        records.append(asdict(case) | {"flops": flops, "repeats": found})
    peak = psutil.Process().memory_info().rss
    if options.out is not None:
        load = os.getloadavg()[1]
        machine = {
            "load": load,
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "rss": peak,
        }
        Path(options.out).write_text(
            json.dumps({"options": asdict(options), "machine": machine, "cases": records}, indent=1)
        )
    print(f"resident memory at the end: {peak / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    run_cli(main)
