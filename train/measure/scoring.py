"""Accuracy by kind of question with confidence intervals, and the blind floor.

Reads the standard library alone: a copy of this file scores an exported task of lmms-eval (`train.harness.local`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.store.sample import Reference

MOST_TEXTS = 12
"""A set of questions without kinds and with at most so many different texts is told apart by its texts."""


@dataclass(frozen=True)
class Question:
    """One question of an evaluation set.

    Attributes:
        sample: Id of the sample it belongs to.
        text: The user's turn.
        answer: The reference.
        kind: What accuracy is told apart by; empty: by the answer.
        answers: All accepted answers; empty: `answer` alone.
        match: How they are compared, one of `data_prep.store.sample.MATCHES`.
    """

    sample: str
    text: str
    answer: str
    kind: str = ""
    answers: tuple[str, ...] = ()
    match: str = "exact"

    @classmethod
    def of(cls, sample: str, text: str, answer: str, reference: Reference | None = None) -> Question:
        """With what the data set says about its scoring, where it does."""
        if reference is None:
            return cls(sample, text, answer)
        return cls(sample, text, answer, reference["kind"], tuple(reference["answers"]), reference["match"])


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
    def of(cls, right: float, count: int) -> Accuracy:
        """From counts; `count` above 0."""
        low, high = wilson(right, count)
        return cls(100 * right / count, count, 100 * low, 100 * high)


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); stays within 0 and 1 where the normal one does not.

    It begins at exactly 0 where none is right and ends at exactly 1 where all are, whatever rounding says.
    """
    share, zz = right / count, z * z
    centre = (share + zz / (2 * count)) / (1 + zz / count)
    half = z / (1 + zz / count) * math.sqrt(share * (1 - share) / count + zz / (4 * count * count))
    return max(0.0, centre - half) if right > 0 else 0.0, min(1.0, centre + half) if right < count else 1.0


def normalise(answer: str) -> str:
    """Answers are compared without case, outer white space and a final full stop."""
    return answer.strip().removesuffix(".").strip().casefold()


def answer_type(answer: str) -> str:
    """`yesno`, `number` or `other`, as in VQAv2: the kind of a question by its reference answer."""
    text = normalise(answer)
    return "yesno" if text in ("yes", "no") else "number" if _number(text) is not None else "other"


def kinds(questions: list[Question]) -> list[str]:
    """The kind of each question: as the data set says; else its text, where there are few; else by its answer."""
    texts = {question.text for question in questions}
    by_text = 1 < len(texts) <= MOST_TEXTS and not any(question.kind for question in questions)
    return [question.kind or (question.text if by_text else answer_type(question.answer)) for question in questions]


def score(question: Question, prediction: str) -> float:
    """How right an answer is, 0 to 1; between them only for `vqa`.

    `exact`: equal to an accepted answer, both normalised. `number`: the same number, whatever its spelling. `choice`:
    the letter of the option (`B`, `(b)`, `B. a dog`) or its text. `contains`: an accepted answer stands in the
    prediction, as whole words. `vqa`: the VQAv2 accuracy, min(1, votes / 3) averaged over all sets of nine votes (Antol
    et al. 2015, section 3).
    """
    accepted, said = question.answers or (question.answer,), normalise(prediction)
    match question.match:
        case "vqa":
            return _vqa_accuracy(accepted, prediction)
        case "number":
            number = _number(said)
            return float(said in map(normalise, accepted) or (number is not None and number in map(_number, accepted)))
        case "choice":
            letter = re.match(r"\(?([a-z])(?:[).:]|$)", said)  # not "a dog"
            named = letter is not None and letter[1] == normalise(accepted[0])
            return float(named or said in map(normalise, accepted))
        case "contains":
            return float(any(re.search(rf"(?<!\w){re.escape(normalise(each))}(?!\w)", said) for each in accepted))
        case _:
            return float(said in map(normalise, accepted))


def followed(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """How often the answer follows the image, percent by kind of question.

    Of two images that are asked the same question and have different right answers, both have to be answered right: a
    model that does not look gets 0, however one-sided the answers are. Kinds without such a pair are not in it.

    Args:
        records: As `train.evaluate` writes them: `question`, `answer`, `type`, `right`.
    """
    asked: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for kind in levels(record["type"]):
            asked[kind, record["question"]][normalise(record["answer"])].append(record["right"])
    pairs: Counter[str] = Counter()
    both: Counter[str] = Counter()
    for (kind, _), answers in asked.items():
        for one, other in combinations(answers.values(), 2):
            pairs[kind] += len(one) * len(other)
            both[kind] += sum(one) * sum(other)
    return {kind: 100 * both[kind] / count for kind, count in pairs.items()}


def _vqa_accuracy(votes: tuple[str, ...], prediction: str) -> float:
    said = _vqa_text(prediction)
    same = [_vqa_text(vote) == said for vote in votes]
    total = sum(same)
    return sum(min(1.0, (total - one) / 3) for one in same) / len(same)


def _vqa_text(answer: str) -> str:
    """As VQAv2's evaluation compares answers: no articles, no punctuation, numbers in digits."""
    words = re.sub(r"[^\w\s']", " ", normalise(answer).replace(",", "")).split()
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words if word not in _ARTICLES)


_ARTICLES = ("a", "an", "the")
_NUMBERS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def _number(text: str) -> float | None:
    text = normalise(text).replace(",", "")
    if text in _NUMBERS[1:]:
        return float(_NUMBERS.index(text))
    return float(text) if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", text) else None


def levels(kind: str) -> list[str]:
    """A kind of question and those it is part of, the widest first: `yesno: color` counts as `yesno` too."""
    parts = kind.split(": ")
    return [": ".join(parts[:end]) for end in range(1, len(parts) + 1)]


def accuracy(questions: list[Question], predictions: list[str], blind: list[str] | None = None) -> dict[str, Accuracy]:
    """Accuracy per kind (`levels`) and `overall`.

    Args:
        questions: All that were asked.
        predictions: The answers to them.
        blind: Answers from the text alone, where only the questions that these get wrong shall count; none: all count.
    """
    right: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for number, (question, kind, prediction) in enumerate(zip(questions, kinds(questions), predictions, strict=True)):
        if blind is not None and score(question, blind[number]) > 0.5:
            continue
        points = score(question, prediction)
        for key in (*(levels(kind) if question.kind else [kind]), "overall"):
            count[key] += 1
            right[key] += points
    return {key: Accuracy.of(right[key], count[key]) for key in sorted(count, key=lambda k: (k == "overall", k))}


def blind_predictions(questions: list[Question], training: Iterable[Question]) -> list[str]:
    """The best answer from the question text alone: its most frequent answer in training, ties by name; for a text
    that training does not hold, the most frequent answer to questions of its kind, or else of all.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in training:
        by_text[question.text][question.answer] += 1
        by_kind[question.kind][question.answer] += 1
        overall[question.answer] += 1

    def best(counter: Counter[str]) -> str:
        return min(counter, key=lambda answer: (-counter[answer], answer))

    return [best(by_text.get(each.text) or by_kind.get(each.kind) or overall) for each in questions]


def as_dict(result: dict[str, Accuracy]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {key: asdict(value) for key, value in result.items()}
