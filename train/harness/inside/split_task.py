"""Questions of a prepared split as a task of lmms-eval; copied into the task's folder, beside `scoring.py`.

Runs in lmms-eval's environment, which has nothing of ours: `scoring.py` is a copy of `train/measure/scoring.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


@functools.cache
def _scoring() -> Any:
    spec = importlib.util.spec_from_file_location("vlora_scoring", Path(__file__).with_name("scoring.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vlora_scoring"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Its images."""
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in doc["images"]]


def doc_to_text(doc: dict[str, Any]) -> str:
    """The last thing the user says."""
    return json.loads(doc["turns"])[-1]["content"]


def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """All turns before the answer; the images stand in the user's first."""
    messages = []
    images: list[dict[str, Any]] = [{"type": "image", "url": image} for image in doc_to_visual(doc)]
    for turn in json.loads(doc["turns"]):
        content: list[dict[str, Any]] = [{"type": "text", "text": turn["content"]}]
        if turn["role"] == "user":
            content, images = images + content, []
        messages.append({"role": turn["role"], "content": content})
    return messages


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The points of one answer, 0 to 100: their mean has the rounding of `train.evaluate`."""
    reference = json.loads(doc["reference"])
    scoring = _scoring()
    question = scoring.Question.of(doc["sample"], doc_to_text(doc), doc["answer"], reference)
    return {"right": 100 * scoring.score(question, results[0])}
