"""A prepared split as a task of lmms-eval: a folder that needs nothing of ours."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from data_prep.store.pixels import PixelPreprocessor
from model.loading import load_tokenizer
from train.config import ConfigError, RunConfig
from train.data import EvalLoader, load_preprocessor, make_text, open_split
from train.measure import scoring

INSIDE = Path(__file__).parent / "inside"
_ROWS = 256
_SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("dialogue", pa.int32()),
        ("images", pa.list_(pa.binary())),
        ("turns", pa.string()),
        ("answer", pa.string()),
        ("reference", pa.string()),
    ]
)


def task_name(split: str) -> str:
    """What lmms-eval calls the task of a split."""
    return "split_" + re.sub(r"\W+", "_", split).strip("_").lower()


def export(config: RunConfig, split: str, folder: Path, limit: int | None = None, seed: int = 0) -> str:
    """Write the task of a prepared split.

    The same questions as `train.evaluate` asks of the same run, with the pixels its encoder would read before they are
    scaled, and its scoring. Images are stored as PNG: another version of a JPEG decoder gives other pixels.

    Args:
        config: Of the run.
        split: `test` or `val` of the run's data, or a prepared folder below its `data.root`.
        folder: The task's folder; made.
        limit, seed: As `train.evaluate`'s `max_samples` and `seed`.

    Returns:
        The task's name.

    Raises:
        ConfigError, DataError: no such split, or it cannot be read.
    """
    path = getattr(config.data, split) if split in ("test", "val") else split
    if path is None:
        raise ConfigError(f"the run's data.{split} is null; name a prepared folder with split=...")
    opened, pixels = open_split(config.data, path), load_preprocessor(config.vision)
    text = make_text(config.data, load_tokenizer(config.llm.path))
    loader = EvalLoader(opened, text, pixels, limit=limit, seed=seed)
    name = task_name(path)
    folder.mkdir(parents=True, exist_ok=True)
    questions, rows = folder / f"{name}.parquet", []
    with pq.ParquetWriter(questions, _SCHEMA) as writer:
        for position, dialogues in loader.chosen:
            sample = opened[position]
            images = [_png(pixels, data) for data in sample.images]
            for number in dialogues:
                *turns, answer = sample.conversations[number]
                reference = sample.references[number] if sample.references else None
                rows.append(
                    {
                        "sample": sample.id,
                        "dialogue": number,
                        "images": images,
                        "turns": json.dumps(turns),
                        "answer": answer["content"],
                        "reference": json.dumps(reference),
                    }
                )
            if len(rows) >= _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    shutil.copyfile(INSIDE / "split_task.py", folder / "split_task.py")
    shutil.copyfile(str(scoring.__file__), folder / "scoring.py")
    (folder / f"{name}.yaml").write_text(_yaml(name, questions, config.evaluation.max_new_tokens), encoding="utf-8")
    return name


def _yaml(name: str, questions: Path, max_tokens: int) -> str:
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {
            "data_files": {"test": str(questions.resolve())},
            "cache_dir": str(questions.resolve().parent / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": max_tokens, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    functions = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    return yaml.safe_dump(task, sort_keys=False) + "".join(
        f"{each}: !function split_task.{each}\n" for each in functions
    )


def _png(pixels: PixelPreprocessor, data: bytes) -> bytes:
    stream = io.BytesIO()
    pixels.picture(data).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
