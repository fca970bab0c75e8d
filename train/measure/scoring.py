"""Accuracy by answer type with confidence intervals, and the blind floor."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from data_prep.text import answers


@dataclass(frozen=True)
class Question:
    """One question of an evaluation set.

    Attributes:
        sample: Id of the sample it belongs to.
        text: The user's turn.
        answer: The reference.
    """

    sample: str
    text: str
    answer: str


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        percent: Accuracy, 0 to 100.
        count: Questions.
        low, high: 95 % Wilson interval, percent.
    """

    percent: float
    count: int
    low: float
    high: float

    @classmethod
    def of(cls, right: int, count: int) -> Accuracy:
        """From counts; `count` above 0."""
        low, high = wilson(right, count)
        return cls(100 * right / count, count, 100 * low, 100 * high)


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); stays within 0 and 1 where the normal one does not."""
    share, zz = right / count, z * z
    centre = (share + zz / (2 * count)) / (1 + zz / count)
    half = z / (1 + zz / count) * math.sqrt(share * (1 - share) / count + zz / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def normalise(answer: str) -> str:
    """Answers are compared without case, outer white space and a final full stop."""
    return answer.strip().removesuffix(".").strip().casefold()


def answer_type(answer: str) -> str:
    """Kind of a reference answer: easy-VQA's `shape`, `color`, `yesno`; of others `number` or `other`, as in VQAv2."""
    return answers.answer_type(normalise(answer))


def accuracy(questions: list[Question], predictions: list[str]) -> dict[str, Accuracy]:
    """Accuracy per answer type and `overall`."""
    right: dict[str, int] = defaultdict(int)
    count: dict[str, int] = defaultdict(int)
    for question, prediction in zip(questions, predictions, strict=True):
        for key in (answer_type(question.answer), "overall"):
            count[key] += 1
            right[key] += normalise(prediction) == normalise(question.answer)
    return {key: Accuracy.of(right[key], count[key]) for key in sorted(count, key=lambda k: (k == "overall", k))}


def blind_predictions(questions: list[Question], training: Iterable[Question]) -> list[str]:
    """The best answer from the question text alone: its most frequent answer in training, ties by name; for a text
    that training does not hold, the most frequent answer of all.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in training:
        by_text[question.text][question.answer] += 1
        overall[question.answer] += 1

    def best(counter: Counter[str]) -> str:
        return min(counter, key=lambda answer: (-counter[answer], answer))

    return [best(by_text.get(question.text) or overall) for question in questions]


def as_dict(result: dict[str, Accuracy]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {key: asdict(value) for key, value in result.items()}
