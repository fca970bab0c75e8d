"""Part d: merging one image's weights, and what it gives: tokens per second and time to the first one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from benchmarks.gpu import models
from benchmarks.gpu.part import Context
from benchmarks.gpu.timing import roof, timed
from model.batch import Batch
from model.decoder.injection import eject
from model.deploy.merging import merged
from model.ops import Placed, set_merge
from model.ops.merge import merged_weights
from model.vlm import VisionLanguageModel


def merge_rates(context: Context) -> None:
    """32 matrices of a 7B decoder, rank 64, by each implementation: GB/s of W read and written, against a copy."""
    copy = roof(context.device, context.dtype, context.tiny)["copy_bytes_per_s"]
    count, d, r = (2, 64, 16) if context.tiny else (32, 4096, 64)
    device, dtype = context.device, context.dtype
    placed = [
        Placed("q", *(torch.randn(shape, device=device).to(dtype) for shape in ((d, d), (d, r), (r, d))))
        for _ in range(count)
    ]
    pristine = [p.weight for p in placed]
    moved = 2 * count * d * d * dtype.itemsize
    for name in ("torch", "triton", "cuda"):
        if name == "cuda" and (device.type != "cuda" or shutil.which("nvcc") is None):
            context.row("cuda", {"ms": None})
            continue
        set_merge(name, device)
        row = timed(lambda: merged_weights(pristine, placed, 1.0), device)
        set_merge("auto")
        rate = moved / (1e-3 * row["ms"])
        context.row(name, row | {"GB_per_s": rate / 1e9, "share_of_copy": rate / copy})


def decoding(context: Context) -> None:
    """Greedy answers of the whole model, plain, branch and merged; the first token against 576 visual ones in front."""
    device, size = context.device, context.size
    config = models.configuration(context.tiny)
    model = models.build(config, device).eval()

    def generate(of: VisionLanguageModel, batch: Batch, tokens: int) -> Callable[[], object]:
        # No token ends the answer: every form decodes the same number.
        return lambda: of.generate(batch, tokens, pad_token_id=0, answer_end=[-1])

    with torch.no_grad():
        for samples in (1, 16) if not context.tiny else (1, 2):
            batch = models.batch(config, samples, size.prompt, device, prompts=True)
            features = model.encode(batch.images).to(model.llm.dtype)
            weights = model.connector(features, batch.image_to_sample, batch.image_weight, samples).weights
            answer = partial(
                model.llm.generate, input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                max_new_tokens=size.answer, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=-1,
            )  # fmt: skip
            forms: dict[str, tuple[AbstractContextManager, Callable[[], object]]] = {
                "plain LLM": (nullcontext(), answer),
                "branch": (nullcontext(), generate(model, batch, size.answer)),
                "merged": (merged(model.llm, weights, 0), answer),
            }
            for name, (around, run) in forms.items():
                with around:
                    row = timed(run, device, 0.0, least=2)
                row["tokens_per_s"] = samples * size.answer / (1e-3 * row["ms"])
                context.row(f"decode, batch {samples}, {name}", row)
        batch = models.batch(config, 1, size.prompt, device, prompts=True)
        context.row("first token, vlora", timed(generate(model, batch, 1), device, 0.5))
        eject(model.llm)
        mlp = models.configuration(context.tiny, "connector=mlp")
        projected = models.connected(mlp, model.vision, model.llm, device).eval()
        visual = projected.vision.num_patches
        context.row(f"first token, mlp ({visual} visual tokens)", timed(generate(projected, batch, 1), device, 0.5))
