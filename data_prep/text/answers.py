"""Kinds of reference answers, by their text: what accuracy is told apart by."""

from __future__ import annotations

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = {"shape": SHAPES, "color": COLORS, "yesno": ("yes", "no")}
"""Answers of each kind; `shape` and `color` are easy-VQA's, the others those of VQAv2."""


def answer_type(answer: str) -> str:
    """`shape`, `color`, `yesno`, `number` or `other`; `answer` in lower case, without a full stop."""
    named = (kind for kind, answers in KINDS.items() if answer in answers)
    return next(named, "number" if answer.isdigit() else "other")
