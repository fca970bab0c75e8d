"""easy-VQA: 64 x 64 pictures of one coloured shape, 13 answers, the official train/test split.

Source: the PyPI package `easy-vqa` 1.0 (MIT). Six splits are made:

    train, val       the official training questions, all questions of an image in one sample; `val` is split off BY
                     IMAGE, by the hash of its bytes
    open_train       the questions of `train` whose answer is a shape or a color; three in four are yes/no questions,
                     most of which are right from their text alone
    caption_train, caption_val   the same images, with captions from facts that their TRAINING questions state
    test             the official test images and questions, nothing else
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.settings import setting
from data_prep.store.errors import DataError
from data_prep.store.sample import Dialogue, Dropped, Reference, Sample
from data_prep.text.dialogues import exchange

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = {"shape": SHAPES, "color": COLORS, "yesno": ("yes", "no")}
"""Answers of each kind of question."""

_STATED = re.compile(
    r"(?:does the image (?P<not1>not )?contain a|is (?:a|(?P<not2>no))(?=.* present)|is there (?P<not3>not )?a) "
    rf"(?:(?P<color>{'|'.join(COLORS)}) shape|(?P<shape>{'|'.join(SHAPES)}))(?: present| in the image)?\?"
)
_SUBJECT = re.compile(rf"what (?:is the (?P<color>{'|'.join(COLORS)}) shape|.*the (?P<shape>{'|'.join(SHAPES)}))\?")


def answer_type(answer: str) -> str:
    """`shape`, `color` or `yesno`: the kind of a reference answer.

    Raises:
        DataError: not one of the 13 answers.
    """
    if found := next((name for name, answers in KINDS.items() if answer in answers), None):
        return found
    raise DataError(f"easy-VQA has no answer {answer!r}; there are {', '.join(sum(KINDS.values(), ()))}")


def kind(question: str, answer: str) -> str:
    """`shape`, `color`, `yesno: shape` or `yesno: color`: what accuracy is told apart by.

    Raises:
        DataError: not one of the answers, or a yes/no question of no known form.
    """
    found = answer_type(answer)
    if found != "yesno":
        return found
    return f"yesno: {'color' if _about(question)['color'] else 'shape'}"


def _about(question: str) -> re.Match[str]:
    if (match := _STATED.fullmatch(question)) is None:
        raise DataError(f"easy-VQA question of unknown form: {question!r}")
    return match


@dataclass(frozen=True)
class Facts:
    """What the questions about one image state: its shape and colour, where they are known."""

    shape: str | None = None
    color: str | None = None


def facts(questions: list[tuple[str, str]]) -> Facts:
    """Shape and colour stated by (question, answer) pairs of one image.

    "is there a red shape?" yes, "is there not a red shape?" no, "what is the red shape?" circle and "what color is the
    circle?" red all state something. What is only ruled out is not used.

    Raises:
        DataError: a question is of no known form, or two contradict each other.
    """
    found: dict[str, set[str]] = {"shape": set(), "color": set()}
    for question, answer in questions:
        if (asked := answer_type(answer)) == "yesno":
            match = _about(question)
            negated = any(match[name] for name in ("not1", "not2", "not3"))
            stated = match if (answer == "yes") != negated else None
        else:
            found[asked].add(answer)
            stated = _SUBJECT.fullmatch(question)
        if stated is not None:
            for name in found:
                if stated[name]:
                    found[name].add(stated[name])
    for name, values in found.items():
        if len(values) > 1:
            raise DataError(f"easy-VQA questions of one image contradict each other: {name} is {sorted(values)}")
    return Facts(*(next(iter(found[name]), None) for name in ("shape", "color")))


CAPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "short": (("", "a {color} {shape}"),),
    "sentences": (
        ("", "The image shows a {color} {shape}."),
        ("", "A photo of a {color} {shape}."),
        ("", "The color of the {shape} is {color}."),
        ("", "The {color} shape is a {shape}."),
        ("", "There is a {color} {shape} in the image."),
        ("", "The shape is a {shape} and its color is {color}."),
    ),
    "facts": (
        ("The image shows", "a {color} {shape}."),
        ("The color of the shape is", "{color}."),
        ("The shape in the image is", "a {shape}."),
    ),
    "requests": (
        ("what is in the image?", "a {color} {shape}"),
        ("describe the image.", "a {color} {shape}"),
        ("what does the image show?", "a {color} {shape}"),
    ),
}
"""Sets of (user text, caption) templates, by name. An empty user text makes a plain caption; that of `facts` opens the
sentence, so that a frozen language model already expects what the image has to supply."""


def captions(known: Facts, style: str) -> list[Dialogue]:
    """One dialogue per template of `CAPTIONS[style]`; none unless both shape and colour are known.

    Raises:
        DataError: no such style.
    """
    if style not in CAPTIONS:
        raise DataError(f"captions={style}: no such set of caption templates; there are {', '.join(CAPTIONS)}")
    if known.shape is None or known.color is None:
        return []
    fill = {"shape": known.shape, "color": known.color}
    return [exchange(user, caption.format(**fill)) for user, caption in CAPTIONS[style]]


@dataclass
class EasyVQA:
    """The source.

    Attributes:
        path: Folder of the unpacked package data (`train/`, `test/`).
        captions: A key of `CAPTIONS`.
        val_fraction: Share of the training images that go to validation.
    """

    path: Path = setting(path=True)
    captions: str = setting("facts", choices=tuple(CAPTIONS))
    val_fraction: float = setting(0.05, within="[0, 1)")

    def made_from(self) -> dict[str, Any]:
        """Everything the samples depend on."""
        questions = {
            part: hashlib.sha256(self._questions_file(part).read_bytes()).hexdigest() for part in ("train", "test")
        }
        return {
            "source": "easy_vqa",
            "reader": 3,  # 2: kinds of the questions; 3: yes/no questions by what they ask about
            "questions": questions,
            "captions": [self.captions, CAPTIONS.get(self.captions)],
            "val_fraction": self.val_fraction,
        }

    def plan(self) -> dict[str, list[None]]:
        """One unit per split."""
        return {split: [None] for split in ("caption_train", "caption_val", "train", "open_train", "val", "test")}

    def read(self, split: str, unit: None) -> Iterator[Sample | Dropped]:
        """Samples of one split, by image number."""
        part = "test" if split == "test" else "train"
        for number, questions in sorted(self._questions(part).items()):
            image = self._image(part, number)
            if part == "train" and split.endswith("val") != self._is_validation(image):
                continue
            if split == "open_train":
                questions = [(q, a) for q, a in questions if answer_type(a) != "yesno"]
                if not questions:
                    continue
            name, references = f"easy_vqa/{part}/{number}", []
            if not split.startswith("caption_"):
                dialogues = [exchange(question, answer) for question, answer in questions]
                references = [Reference(kind=kind(*each), answers=[], match="exact") for each in questions]
            elif not (dialogues := captions(facts(questions), self.captions)):
                # Not a defect: the questions of this image leave its shape or its colour open.
                continue
            yield Sample(name, [image], dialogues, "easy_vqa", references)

    def _is_validation(self, image: bytes) -> bool:
        return int(hashlib.sha256(image).hexdigest()[:8], 16) < self.val_fraction * 2**32

    def _questions_file(self, part: str) -> Path:
        file = self.path / part / "questions.json"
        if not file.is_file():
            raise DataError(f"{file} is missing; run: python -m data_prep.parts easy_vqa")
        return file

    def _questions(self, part: str) -> dict[int, list[tuple[str, str]]]:
        grouped: dict[int, list[tuple[str, str]]] = {}
        for question, answer, number in json.loads(self._questions_file(part).read_text(encoding="utf-8")):
            grouped.setdefault(number, []).append((question, answer))
        return grouped

    def _image(self, part: str, number: int) -> bytes:
        file = self.path / part / "images" / f"{number}.png"
        try:
            return file.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{file} is missing; run: python -m data_prep.parts easy_vqa") from None
