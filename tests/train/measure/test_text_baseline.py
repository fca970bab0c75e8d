import math
import re
from collections import Counter
from random import Random

from train.measure.scoring import Question, blind_predictions
from train.measure.text_baseline import text_predictions


def asked(texts, kind=""):
    return [Question("s", text, answer, kind) for text, answer in texts]


def test_words_carry_over_to_questions_that_are_new():
    training = asked([(f"what color is the {x}?", "red") for x in "abc"] + [(f"how many {x}?", "2") for x in "abcd"])
    new = asked([("what color is the z?", "?"), ("how many z?", "?"), ("", "?")])
    assert text_predictions(new, training) == ["red", "2", "2"]
    assert blind_predictions(new, training) == ["2"] * 3  # a table has only the most frequent answer for them
    kinds = asked([("a", "x")] * 3, "k") + asked([("a", "y")] * 2, "l")
    assert text_predictions(asked([("a", "?")], "k") + asked([("a", "?")], "l"), kinds) == ["x", "y"]


def test_likeliest_answers_against_the_formula():
    random = Random(0)
    words = ["is", "the", "cat", "dog", "red", "left", "of", "what"]
    training = asked([(" ".join(random.choices(words, k=4)), random.choice("xyz")) for _ in range(60)], "k")
    counts = {answer: Counter() for answer in "xyz"}
    for each in training:
        found = re.findall(r"\w+", each.text)
        counts[each.answer].update([*found, *map(" ".join, zip(found, found[1:], strict=False)), "kind k"])
    features = set().union(*counts.values())
    for question in asked([(" ".join(random.choices(words, k=3)), "?") for _ in range(40)], "k"):
        found = re.findall(r"\w+", question.text)
        found = [*found, *map(" ".join, zip(found, found[1:], strict=False)), "kind k"]

        def score(answer, found=found):
            total = sum(counts[answer].values()) + 0.1 * len(features)
            likelihood = sum(math.log((counts[answer][f] + 0.1) / total) for f in found if f in features)
            return math.log(sum(q.answer == answer for q in training)) + likelihood

        assert text_predictions([question], training) == [max("xyz", key=score)]
