"""Rows of a table (a Hugging Face data set, CSV, JSON Lines) in their common shapes, to dialogues of the schema."""

from __future__ import annotations

import base64
import binascii
import json
import string
from collections import Counter
from dataclasses import dataclass
from typing import Any

from data_prep.store.errors import DataError, Defect
from data_prep.store.sample import Dialogue, Reference
from data_prep.text.dialogues import exchange, from_text_or_turns, settle

NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "picture", "photo", "file_name", "image_path", "filename", "file", "path"),
    "turns": ("conversations", "messages", "conversation", "texts", "dialogue", "turns"),
    "question": ("question", "questions", "query", "prompt", "instruction"),
    "answer": ("multiple_choice_answer", "answer", "answers", "response", "output", "label", "labels"),
    "caption": (
        "caption",
        "captions",
        "text",
        "sentence",
        "sentences",
        "description",
        "label",
        "class",
        "name",
    ),
    "choices": ("choices", "options"),
    "kind": ("kind", "answer_type", "question_type", "category"),
}
"""What a column of each of these names is taken for, the likelier name first."""
BESIDE_QUESTIONS = ("caption", "captions", "text", "sentence", "sentences", "description")
"""Of the names of captions, those that mean one in a table of questions too."""
VQA_ANNOTATORS = 10
"""From so many answers on they are people's votes, and are scored as in VQAv2."""


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what; none: the table has no such column.

    Attributes:
        image: Image files or paths of them.
        text: Captions, turns, or exchanges; with `question`, the answers.
        question: Questions.
        choices: The options of a multiple-choice question, whose answer is then a number, a letter or an option.
        answers: All accepted answers, where `text` has only one of them.
        kind: Kind of a question, for accuracy by kind.
        caption: Captions beside the questions.
    """

    image: str | None
    text: str
    question: str | None = None
    choices: str | None = None
    answers: str | None = None
    kind: str | None = None
    caption: str | None = None

    @property
    def used(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(filter(None, vars(self).values())))


def find(names: list[str], image: str | None, text: str | None, question: str | None, where: str) -> Columns:
    """The columns of a table, by their names where they are not given.

    Args:
        names: All columns.
        image, text, question: As chosen by the user; none: found by name. `image=""`: the rows have no image.
        where: The table, for messages.

    Raises:
        DataError: a chosen column is not there, or none is known; says which there are and which are known.
    """
    for key, value in (("image", image), ("text", text), ("question", question)):
        if value and value not in names:
            raise DataError(f"{where} has no column {value} (source.{key}); columns are {', '.join(names)}")

    def first(kind: str) -> str | None:
        return next((name for name in NAMES[kind] if name in names and name not in (image, text, question)), None)

    if image is None and (image := first("image")) is None:
        raise _unknown("image", names, where)
    if text is None:
        if question is None and (turns := first("turns")):
            return Columns(image or None, turns)
        question = question or first("question")
        if (text := first("answer") if question else first("caption")) is None:
            raise _unknown("answer" if question else "caption", names, where)
    if question is None:
        return Columns(image or None, text)
    answers = "answers" if "answers" in names and text != "answers" else None
    caption = next((name for name in BESIDE_QUESTIONS if name in names and name not in (image, text, question)), None)
    return Columns(image or None, text, question, first("choices"), answers, first("kind"), caption)


def _unknown(kind: str, names: list[str], where: str) -> DataError:
    key = {"image": "image", "caption": "text", "answer": "text"}[kind]
    known = NAMES[kind] if kind != "caption" else (*NAMES["turns"], *NAMES["caption"])
    return DataError(
        f"{where} has no column known as {kind}; columns are {', '.join(names)}, known are {', '.join(known)}; "
        f"say which with source.{key}=COLUMN"
    )


def dialogues(row: dict[str, Any], columns: Columns, images: int) -> tuple[list[Dialogue], list[Reference], int]:
    """A row's dialogues, how their answers are scored (none for captions and turns), and the image tokens taken out.

    Raises:
        Defect: a text of an unknown shape.
    """
    text = row[columns.text]
    if columns.question is None:
        found, tokens = from_text_or_turns(as_text(text), images)
        return found, [], tokens
    question = row[columns.question]
    if isinstance(question, list):
        answers = text if isinstance(text, list) else [text]
        if len(answers) != len(question):
            raise Defect("questions differ from answers", f"{len(question)} questions, {len(answers)} answers")
        pairs = [_pair(one, other, row, columns) for one, other in zip(question, answers, strict=True)]
    else:
        pairs = [_pair(question, text, row, columns)]
    settled = [settle(dialogue, images) for dialogue, _ in pairs]
    references = [reference for _, reference in pairs]
    return [dialogue for dialogue, _ in settled], references, sum(taken for _, taken in settled)


def captions(row: dict[str, Any], columns: Columns) -> list[str]:
    """What a row's captions say: those beside its questions, or else its texts that are no turns."""
    value = as_text(row[columns.caption or columns.text]) if columns.caption or columns.question is None else None
    listed = value if isinstance(value, list) else [value]
    return [text for text in listed if isinstance(text, str) and text.strip()]


def _pair(question: Any, answer: Any, row: dict[str, Any], columns: Columns) -> tuple[Dialogue, Reference]:
    if not isinstance(question, str):
        raise Defect("question is no text", f"found {type(question).__name__}")
    kind = str(row[columns.kind]) if columns.kind and row[columns.kind] is not None else ""
    options = row[columns.choices] if columns.choices else None
    if isinstance(options, str):
        options = listed(options)
    if options:
        return _choice(question, answer, [str(option) for option in options], kind)
    accepted = all_answers(answer)
    votes = all_answers(row[columns.answers]) if columns.answers and row[columns.answers] is not None else []
    if not accepted:
        raise Defect("answer empty", columns.text)
    # The answer that most gave is learned; of several with as many, the first.
    target = Counter(accepted).most_common(1)[0][0]
    every = votes or accepted
    match = "vqa" if len(every) >= VQA_ANNOTATORS else "exact"
    return exchange(question, target), Reference(kind=kind, answers=every if len(every) > 1 else [], match=match)


def _choice(question: str, answer: Any, options: list[str], kind: str) -> tuple[Dialogue, Reference]:
    letters = string.ascii_uppercase[: len(options)]
    if isinstance(answer, int) and 0 <= answer < len(letters):
        number = answer
    elif isinstance(answer, str) and answer in options:
        number = options.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        number = letters.index(answer.upper())
    else:
        raise Defect("answer is none of the choices", f"{str(answer)[:40]!r} of {len(options)} choices")
    lines = [question, *(f"{letter}. {option}" for letter, option in zip(letters, options, strict=False))]
    reference = Reference(kind=kind, answers=[letters[number], options[number]], match="choice")
    return exchange("\n".join(lines), letters[number]), reference


def as_text(value: Any) -> Any:
    """Numbers as text; text that is a JSON list (as CSV has to write one) as that list; all else as it is."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str) and value.startswith("[") and (found := listed(value)) is not None:
        return found
    return value


def listed(text: str) -> list[Any] | None:
    """A JSON list written as text; none where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def all_answers(value: Any) -> list[str]:
    """Accepted answers: of a text, a number, a yes or no, a list of these, or VQAv2's list of `{"answer": ...}`."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    value = as_text(value)
    if isinstance(value, dict):  # datasets' old form of a list of objects: an object of lists
        value = value.get("answer")
    if isinstance(value, list):
        return [text for each in value for text in all_answers(each)]
    return [value] if isinstance(value, str) and value.strip() else []


def image_bytes(value: Any) -> bytes | str | None:
    """What an image cell holds: the file's bytes, or the path of one; none where it is empty.

    Known are bytes, `{"bytes", "path"}` as `datasets` stores images, base64 text (with or without `data:image/...,`),
    and paths.

    Raises:
        Defect: none of these.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        known = "bytes, {bytes, path}, base64 and paths"
        raise Defect("image of unknown shape", f"found {type(value).__name__}; known are {known}")
    if not value:
        return None
    head, comma, body = value.partition(",")
    if comma and head.startswith("data:"):
        return _unbase64(body)
    # The first bytes of a JPEG, PNG, GIF, WebP, BMP or TIFF file in base64; no path of this length begins so.
    if len(value) > 100 and value.startswith(("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")):
        return _unbase64(value)
    return value


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise Defect("image is not base64", str(error)) from error
