from itertools import combinations
from random import Random

import pytest

from train.measure.scoring import (
    Accuracy,
    Question,
    accuracy,
    blind_predictions,
    followed,
    normalise,
    score,
    wilson,
)


def test_wilson_against_published_values():
    """Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3."""
    for right, count, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    for count in range(1, 400):  # none right is not above nothing: exactly, whatever rounding says
        assert wilson(0, count)[0] == 0.0 and wilson(count, count)[1] == 1.0
        assert wilson(1, count + 1)[0] > 0.0 and wilson(count, count + 1)[1] < 1.0


def test_accuracy_is_counted_per_kind():
    """By the data set's kinds; else by the text of few questions; else by the answer."""
    asked = (("red", "color"), ("blue", "color"), ("circle", "shape"), ("yes", ""))
    questions = [Question("a", "q", answer, kind) for answer, kind in asked]
    result = accuracy(questions, ["Red.", "green", " circle", "no"])
    assert list(result) == ["color", "shape", "yesno", "overall"]
    assert result["color"].percent == 50 and result["color"].count == 2
    assert result["overall"] == Accuracy.of(2, 4)
    few = [Question("a", f"what {n}?", "x") for n in (0, 1, 0)]
    assert list(accuracy(few, ["x"] * 3)) == ["what 0?", "what 1?", "overall"]
    many = [Question("a", f"what {n}?", answer) for n in range(7) for answer in ("Yes", "12", "a brown dog")]
    many += [Question("a", f"who {n}?", "3.5") for n in range(7)]
    assert {name: result.count for name, result in accuracy(many, ["no"] * 28).items()} == {
        "number": 14, "other": 7, "yesno": 7, "overall": 28,
    }  # fmt: skip


def test_a_part_of_a_kind_counts_in_the_whole_too():
    """Texts with a colon are no kinds."""
    kinds = ("yesno: color", "yesno: shape", "yesno: color", "color")
    questions = [Question("a", f"q {n}", "yes", kind) for n, kind in enumerate(kinds)]
    result = accuracy(questions, ["yes", "no", "yes", "no"])
    assert {name: (each.percent, each.count) for name, each in result.items()} == {
        "color": (0, 1), "yesno": (pytest.approx(200 / 3), 3), "yesno: color": (100, 2), "yesno: shape": (0, 1),
        "overall": (50, 4),
    }  # fmt: skip
    texts = [Question("a", f"choose: {n}?", "x") for n in (0, 1)]
    assert list(accuracy(texts, ["x"] * 2)) == ["choose: 0?", "choose: 1?", "overall"]
    records = [
        {"type": kind, "question": "?", "answer": answer, "right": right}
        for kind, answer, right in (("y: a", "yes", True), ("y: a", "no", True), ("y: b", "yes", False))
    ]
    assert followed(records) == {"y": 50, "y: a": 100}


def test_rarer_answers_are_those_that_the_blind_floor_gets_wrong():
    questions = [Question("a", "q", answer, "k") for answer in ("yes", "no", "no", "no")]
    rarer = accuracy(questions, ["yes", "no", "yes", "yes"], blind=["no"] * 4)
    assert {name: (each.percent, each.count) for name, each in rarer.items()} == {"k": (100, 1), "overall": (100, 1)}
    assert accuracy(questions[1:], ["no"] * 3, blind=["no"] * 3) == {}


def test_an_answer_follows_the_image_where_both_of_a_pair_are_right():
    random = Random(1)
    records = [
        {"type": kind, "question": f"{kind} {random.randrange(3)}?", "answer": random.choice(("yes", "No.", "no", "2")),
         "right": random.random() < 0.7}
        for kind in ("a", "b") for _ in range(40)
    ]  # fmt: skip
    found = followed(records)
    for kind in ("a", "b"):
        mine = [record for record in records if record["type"] == kind]
        pairs = [
            one["right"] and other["right"] for one, other in combinations(mine, 2)
            if one["question"] == other["question"] and normalise(one["answer"]) != normalise(other["answer"])
        ]  # fmt: skip
        assert found[kind] == pytest.approx(100 * sum(pairs) / len(pairs)) and 0 < found[kind] < 100
    blind = [{"type": "y", "question": "?", "answer": a, "right": a == "yes"} for a in ("yes", "yes", "yes", "no")]
    assert followed(blind) == {"y": 0} and followed(blind[:2]) == {}


@pytest.mark.parametrize(
    ("match", "answers", "right", "wrong"),
    [
        ("exact", ["the end", "end"], ["The End.", "end"], ["the", "ending", ""]),
        ("number", ["3"], ["3", "3.0", "three", " 3. "], ["33", "thirty", "", "none"]),
        ("number", ["1,200"], ["1200", "1,200"], ["1.2"]),
        ("choice", ["B", "a dog"], ["B", "b.", "(B)", "B. a dog", "a dog", "B) a dog"], ["A", "bat", "a cat", ""]),
        ("choice", ["A", "dog"], ["a", "A: dog", "dog"], ["a cat", "an ox", "B"]),
        ("contains", ["red"], ["it is red", "Red!", "red"], ["reddish", "no", ""]),
    ],
)
def test_answers_are_compared_as_the_data_set_says(match, answers, right, wrong):
    question = Question("a", "q", answers[0], answers=tuple(answers), match=match)
    assert [score(question, said) for said in right] == [1.0] * len(right)
    assert [score(question, said) for said in wrong] == [0.0] * len(wrong)


def test_vqa_accuracy_against_its_definition():
    """min(1, n / 3) averaged over every choice of nine of the ten votes, as the VQAv2 paper says."""
    votes = ("red",) * 3 + ("dark red",) * 2 + ("maroon",) * 5
    for said in ("Red.", "the red", "dark red", "maroon", "blue"):
        plain = said.lower().removesuffix(".").removeprefix("the ")
        sets = [votes[:n] + votes[n + 1 :] for n in range(10)]
        expected = sum(min(1, nine.count(plain) / 3) for nine in sets) / 10
        assert score(Question("a", "q", "red", answers=votes, match="vqa"), said) == pytest.approx(expected)
    assert score(Question("a", "q", "2", answers=("2",) * 10, match="vqa"), "two") == 1


def test_blind_predictions_use_training_only():
    training = [Question("s", "what color?", "red")] * 2 + [Question("s", "what color?", "blue")]
    training += [Question("s", "is it?", "yes"), Question("s", "is it?", "no")]
    asked = [Question("t", text, "blue") for text in ("what color?", "is it?", "never seen")]
    assert blind_predictions(asked, training) == ["red", "no", "red"]


def test_answers_are_normalised():
    assert normalise(" Yes. ") == "yes"
    assert normalise("a. b") == "a. b"
