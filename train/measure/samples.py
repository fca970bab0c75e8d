"""The table of sample images with question, answer and prediction that a run logs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from common.files import write_atomically
from model.generation import answers
from train.config import RunConfig
from train.data import EvalLoader
from train.engine.engine import Engine
from train.measure.tracking import Tracker
from train.process.run_files import RunDir

COLUMNS: list[str | int] = ["image", "question", "answer", "prediction"]


def predict(engine: Engine, loader: EvalLoader, config: RunConfig) -> list[dict[str, Any]]:
    """Answers to the loader's prompts. Collective: every rank runs the same batches, as ZeRO-3 needs."""
    model = engine.model
    model.eval()
    rows: list[dict[str, Any]] = []
    for evaluation in loader:
        batch = evaluation.batch.to(engine.device)
        texts = answers(model, batch, evaluation.encoders, config.evaluation.max_new_tokens)
        for item, text in zip(evaluation.items, texts, strict=False):  # a filler batch has no items
            rows.append({"sample": item.sample, "question": item.question, "answer": item.answer, "prediction": text})
    model.train()
    wanted = {row["sample"] for row in rows}
    images = {sample.id: sample.images for sample in loader.split if sample.id in wanted}
    for row in rows:
        row["images"] = images[row["sample"]]
    return rows


def write(run_dir: Path, step: int, rows: list[dict[str, Any]], tracker: Tracker) -> None:
    """Keep the table as `samples/step-N.jsonl` and log it with pictures, as `answers`: `samples` is a counter."""
    folder = RunDir(run_dir).samples
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({k: v for k, v in row.items() if k != "images"}) for row in rows]
    write_atomically(folder / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")
    cells = [
        [
            Image.open(io.BytesIO(row["images"][0])).convert("RGB") if row["images"] else None,
            row["question"],
            row["answer"],
            row["prediction"],
        ]
        for row in rows
    ]
    tracker.table(step, "answers", COLUMNS, cells)
