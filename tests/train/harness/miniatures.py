"""The thirteen benchmarks in their column layouts, four rows each, and the answers of a planted model to them.

Every question holds a marker of its own, `q-NAME-NUMBER`; the planted model answers by it. The scores to be reached are
worked out by hand, beside each.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from tests.train.harness.loopback import Handler, listening

_TEXT, _NUMBER = Value("string"), Value("int64")
_ASKED = ("A", "B", "C", "D")


def _choice(name: str, **more: Any) -> list[dict[str, Any]]:
    options = [{letter: f"thing {letter}{number}" for letter in _ASKED} for number in range(4)]
    return [
        {
            "index": number,
            "question": f"q-{name}-{number} what is it?",
            "answer": "B",
            "category": "c",
            **option,
            **more,
        }
        for number, option in enumerate(options)
    ]


def _votes(*answers: str) -> list[str]:
    return [answer for answer in answers for _ in range(10 // len(answers))]


ROWS: dict[str, list[dict[str, Any]]] = {
    "mmbench": _choice("mmbench", **{"L2-category": "l", "hint": "nan", "source": "s", "split": "dev"}),
    "ccbench": _choice("ccbench", source="s"),
    "mme": [
        {
            "question_id": f"p{n // 2}",
            "question": f"q-mme-{n} Please answer yes or no.",
            "answer": a,
            "category": "count",
        }
        for n, a in enumerate(("Yes", "No", "Yes", "No"))
    ],
    "scienceqa": [
        {"question": f"q-scienceqa-{n}", "choices": ["x", "y"], "answer": n % 2, "hint": ""} for n in range(4)
    ],
    "hallusionbench": [
        {
            "question": f"q-hallusionbench-{n} is it?",
            "gt_answer": answer,
            "gt_answer_details": "so",
            "category": "VD",
            "subcategory": "chart",
            "set_id": "0",
            "figure_id": str(figure),
            "question_id": str(question),
            "visual_input": "1",
        }
        for n, (figure, question, answer) in enumerate(((0, 0, "1"), (0, 1, "0"), (1, 0, "0"), (1, 1, "1")))
    ],
    "mmmu": [
        {
            "id": f"validation_Art_{n}",
            "question": f"q-mmmu-{n} <image 1> what?",
            "options": "[]" if n == 3 else "['x', 'y']",
            "answer": "7" if n == 3 else "A",
            "question_type": "open" if n == 3 else "multiple-choice",
        }
        for n in range(4)
    ],
    "textvqa": [
        {"question_id": n, "question": f"q-textvqa-{n}", "answers": _votes("stop", "go"), "ocr_tokens": ["stop"]}
        for n in range(4)
    ],
    "docvqa": [{"questionId": str(n), "question": f"q-docvqa-{n}", "answers": ["1999"]} for n in range(4)],
    "infovqa": [{"questionId": str(n), "question": f"q-infovqa-{n}", "answers": ["forty"]} for n in range(4)],
    "ocrbench": [
        {
            "dataset": "IIIT5K",
            "question": f"q-ocrbench-{n}",
            "question_type": "Regular Text Recognition",
            "answer": ["ab"],
        }
        for n in range(4)
    ],
    "pope": [
        {"question_id": str(n), "question": f"q-pope-{n} is there?", "answer": a, "category": "random"}
        for n, a in enumerate(("yes", "yes", "no", "no"))
    ],
    "gqa": [{"id": str(n), "imageId": str(n), "question": f"q-gqa-{n}", "answer": "left"} for n in range(4)],
    "vqav2": [
        {
            "question_id": n,
            "question": f"q-vqav2-{n}",
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": "two",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(_votes("two"))],
        }
        for n in range(4)
    ],
}

SAID: dict[str, tuple[tuple[str, str, str, str], float]] = {
    "mmbench": (("B", "B. thing B1", "thing B2", "A"), 75.0),
    "ccbench": (("B", "A", "C", "thing B3"), 50.0),
    # Both of a picture right: 100 + 100; one of two: 50. Their mean.
    "mme": (("Yes", "No", "yes.", "yes"), 125.0),
    "scienceqa": (("A", "B", "B", "b"), 75.0),
    # Right, right, wrong, right: aAcc 3/4; figure 0 alone, question 1 alone: 1/2 each. Their mean.
    "hallusionbench": (("Yes", "no", "Yes, it is", "yes"), 100 * (0.75 + 0.5 + 0.5) / 3),
    "mmmu": (("A", "(A)", "B", "7"), 75.0),
    # Five votes for each: one of them taken out, four or five remain, both above three.
    "textvqa": (("stop", "Go", "halt", "STOP"), 75.0),
    # 1998 for 1999: one of four letters wrong, similarity 3/4.
    "docvqa": (("1999", "1998", "x", "1999"), 100 * (1 + 0.75 + 0 + 1) / 4),
    "infovqa": (("forty", "Forty", "none", "forty"), 75.0),
    # Points of 1000, whatever the number of questions.
    "ocrbench": (("ab", "it says ab", "no", "AB"), 0.3),
    # Two yes right, one no wrong: precision 2/3, recall 1.
    "pope": (("Yes", "yes", "yes", "no"), 100 * 2 * (2 / 3) / (2 / 3 + 1)),
    "gqa": (("left", "Left.", "right", "left"), 75.0),
    "vqav2": (("two", "2", "three", "a two"), 75.0),
}
"""What the planted model says to each question, and the score it must get."""


def write(folder: Path) -> dict[str, dict[str, Any]]:
    """Write all as Parquet files.

    Returns:
        What is laid over each benchmark's task, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {}
    for name, rows in ROWS.items():
        column = "image_1" if name == "mmmu" else "image"
        for number, row in enumerate(rows):
            row[column] = Pictures.new("RGB", (12, 12), colour(name, number))
        features = Features({key: _feature(key, value) for key, value in rows[0].items()})
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")
        overrides[name] = {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {_split(name): str(folder / f"{name}.parquet")}, "cache_dir": str(folder)},
        }
    overrides["gqa"]["process_docs"] = None  # it joins the pictures, which lie in a data set of their own
    return overrides


def colour(name: str, number: int) -> tuple[int, int, int]:
    """Of a question's picture."""
    return 60 * number, 9 * len(name), 200


def _colour(part: dict[str, Any]) -> tuple[int, ...]:
    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    found: Any = Pictures.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5))
    return tuple(found)


def _split(name: str) -> str:
    from train.harness import catalogue

    return catalogue.load(name).split


def _feature(key: str, value: Any) -> Any:
    if key.startswith("image") and isinstance(value, Pictures.Image):
        return Image()
    if isinstance(value, list):
        return List(
            {each: _feature(each, one) for each, one in value[0].items()} if isinstance(value[0], dict) else _TEXT
        )
    return _NUMBER if isinstance(value, int) else _TEXT


@contextmanager
def planted() -> Iterator[tuple[str, list[tuple[str, list[tuple[int, ...]]]]]]:
    """A server of the OpenAI chat API that knows the answers.

    Yields:
        Its address, and what it was asked: marker and the colour of every picture.
    """
    asked: list[tuple[str, list[tuple[int, ...]]]] = []

    class Answers(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            parts = body["messages"][-1]["content"]
            text = " ".join(part["text"] for part in parts if part["type"] == "text")
            marker = re.search(r"q-(\w+)-(\d)", text, re.IGNORECASE)
            asked.append((marker[0].lower(), [_colour(part) for part in parts if part["type"] == "image_url"]))
            said = SAID[marker[1]][0][int(marker[2])]
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            answer = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            )
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(answer.encode())

    with listening(Answers) as address:
        yield f"{address}/v1", asked
