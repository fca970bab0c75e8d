"""Results of a suite as tables: beside the paper's Tables 1 and 6 and others' scores, and what an image is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.markdown import as_table, plain
from train.harness.catalogue import IMAGES
from train.measure.paper_tables import FINE, GENERAL, LLAVA, TABLES, VLORA

SEEING = ("POPE", "GQA", "VQAv2")
_FINE = {row.name: dict(zip(FINE, row.scores, strict=True)) for row in TABLES[-2].rows}
ANCHORS: dict[str, dict[str, float]] = {
    "VLoRA-7B [1]": dict(zip(GENERAL, VLORA, strict=True)) | _FINE["VLoRA"],
    "LLaVA-v1.5-7B [1, 2]": dict(zip(GENERAL, LLAVA, strict=True))
    | _FINE["LLaVA-v1.5"]
    | {"POPE": 85.9, "GQA": 62.0, "VQAv2": 78.5},
    "LLaVA-Mini-7B, 1 token [3]": {
        "MMBench": 65.6,
        "MME": 1466.0,
        "ScienceQA": 70.4,
        "TextVQA": 57.0,
        "POPE": 84.4,
        "GQA": 60.9,
        "VQAv2": 77.6,
    },
    "EVLM-3B [4]": {"MMBench": 72.4, "ScienceQA": 76.2, "MMMU": 39.1, "GQA": 63.9},
    "CASA-Qwen2.5-VL-3B [5]": {"TextVQA": 77.4, "DocVQA": 88.9, "InfoVQA": 59.6, "OCRBench": 79.0, "GQA": 59.4},
    "no image, Vicuna-7B [6]": {
        "MMBench": 22.3,
        "MME": 617.3,
        "ScienceQA": 60.7,
        "POPE": 53.9,
        "GQA": 37.7,
        "VQAv2": 41.2,
    },
}
"""Printed scores by model; what a source does not print is left out."""

SOURCES = """\
[1] VLoRA (arXiv 2405.20339), Tables 1 and 6. [2] POPE, GQA and VQAv2: LLaVA's model zoo. [3] LLaVA-Mini
(arXiv 2501.03895), Table 1. [4] AMD's article on EVLM-3B. [5] CASA's README; OCRBench's 790 points of 1000 as
percent; its MME is perception and cognition together and is left out. [6] The lower bound in VoCo-LLaMA's Table 1.
LaVi (arXiv 2506.16691): no table of it was at hand. Others' harnesses, prompts and splits differ: a gap of a point or
two says nothing.
"""


def render(records: Sequence[dict[str, Any]], run: str) -> str:
    """All results of a run as Markdown.

    Args:
        records: As `train.harness.jobs.run` returns them.
        run: The run, for the title.
    """
    whole = [record for record in records if not record["limit"]]
    ours = {record["benchmark"]: record["score"] for record in whole if record["images"] == IMAGES[0]}
    parts = [f"# Benchmarks of {plain(run)}", 'Made by `python -m train.benchmark`. "-": not run, or not printed.']
    groups = (("Table 1 of the paper", GENERAL), ("Table 6 of the paper", FINE[:-1]), ("Seeing", SEEING))
    for title, names in groups:
        parts.append(_beside(title, names, ours))
    parts.append(SOURCES.strip())
    if seen := _controls(records):
        parts += ["## What the image is worth", _BLIND, seen]
    parts += ["## How each was asked", _asked(records)]
    return "\n\n".join(parts) + "\n"


_BLIND = (
    "`none` is the blind score: with no image there are no weights (or tokens) of one, and the run's language model "
    "answers from the text alone. `shuffled` shows the image of another question. A score that both keep needs no eyes."
)


def _beside(title: str, names: Sequence[str], ours: dict[str, float]) -> str:
    rows = [["model", *names]]
    for model, scores in ANCHORS.items():
        if any(name in scores for name in names):
            rows.append([model, *(_cell(scores.get(name)) for name in names)])
    rows.append(["**this run**", *(_cell(ours.get(name)) for name in names)])
    return f"## {title}\n\n{as_table(rows)}"


def _controls(records: Sequence[dict[str, Any]]) -> str:
    found: dict[tuple[str, int], dict[str, float]] = {}
    for record in records:
        found.setdefault((record["benchmark"], record["limit"] or 0), {})[record["images"]] = record["score"]
    rows = [["benchmark", *IMAGES, "own - none"]]
    for (name, limit), scores in found.items():
        if len(scores) > 1:
            gain = scores["own"] - scores["none"] if {"own", "none"} <= scores.keys() else None
            shown = [_cell(scores.get(images)) for images in IMAGES]
            rows.append([f"{plain(name)}{f' (first {limit})' if limit else ''}", *shown, _cell(gain)])
    return as_table(rows) if len(rows) > 1 else ""


def _asked(records: Sequence[dict[str, Any]]) -> str:
    rows = [["benchmark", "images", "score", "questions", "split", "metric", "prompt", "max tokens", "judge", "note"]]
    for one in records:
        questions = f"first {one['questions']}: no benchmark score" if one["limit"] else str(one["questions"])
        prompt = "; ".join(f"{key}={value!r}" for key, value in one["prompt"].items() if value != "")
        rows.append(
            [
                plain(one["benchmark"]),
                one["images"],
                _cell(one["score"]),
                questions,
                plain(one["split"]),
                plain(" ".join(one["metric"])),
                plain(prompt) or "-",
                str(one["max_tokens"]),
                plain(one["judge"] or "none asked"),
                plain(one["note"] or "-"),
            ]
        )
    return as_table(rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
