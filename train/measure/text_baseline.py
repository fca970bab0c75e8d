"""What a reader of the questions' words alone would answer: naive Bayes over words and pairs of words.

The blind floor of `train.measure.scoring` looks a whole question up; this one carries over to questions that training
did not hold word for word. A model is said to see only above both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from train.measure.scoring import Question

ANSWERS, FEATURES = 1000, 20_000
"""The most frequent answers, and words and pairs of words, that count."""
_SMOOTHING = 0.1


def text_predictions(questions: list[Question], training: Iterable[Question]) -> list[str]:
    """The likeliest of training's frequent answers, by the words of the question and of its kind.

    Multinomial naive Bayes (McCallum and Nigam 1998), additive smoothing; ties by frequency, then by name.

    Args:
        questions: What is asked.
        training: Questions with answers to learn from; at least one.
    """
    learned = [(_features(each), each.answer) for each in training]
    frequent = sorted(Counter(answer for _, answer in learned).items(), key=lambda item: (-item[1], item[0]))[:ANSWERS]
    answers = {answer: number for number, (answer, _) in enumerate(frequent)}
    known = Counter(feature for features, _ in learned for feature in features)
    columns = {feature: n for n, (feature, _) in enumerate(known.most_common(FEATURES))}
    counts = np.full((len(answers), len(columns)), _SMOOTHING, dtype=np.float32)
    for features, answer in learned:
        if answer in answers:
            np.add.at(counts[answers[answer]], [columns[f] for f in features if f in columns], 1)
    likelihood = np.log(counts) - np.log(counts.sum(1, keepdims=True))
    prior = np.log([count for _, count in frequent])
    names = list(answers)
    found: dict[tuple[str, str], str] = {}
    for each in questions:
        if (each.kind, each.text) not in found:
            seen = [columns[feature] for feature in _features(each) if feature in columns]
            found[each.kind, each.text] = names[int((prior + likelihood[:, seen].sum(1)).argmax())]
    return [found[each.kind, each.text] for each in questions]


def _features(question: Question) -> list[str]:
    words = re.findall(r"\w+", question.text.casefold())
    return [*words, *(f"{one} {other}" for one, other in zip(words, words[1:], strict=False)), f"kind {question.kind}"]
