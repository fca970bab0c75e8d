import pytest

from train.measure.scoring import Accuracy, Question, accuracy, answer_type, blind_predictions, normalise, wilson


def test_wilson_against_published_values():
    """Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3."""
    for right, count, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_accuracy_is_counted_per_answer_type():
    questions = [Question("a", "q", answer) for answer in ("red", "blue", "circle", "yes")]
    result = accuracy(questions, ["Red.", "green", " circle", "no"])
    assert list(result) == ["color", "shape", "yesno", "overall"]
    assert result["color"].percent == 50 and result["color"].count == 2
    assert result["overall"] == Accuracy.of(2, 4)


def test_answers_of_other_data_sets_have_vqav2_types():
    kinds = {"Yes": "yesno", "red.": "color", "circle": "shape", "12": "number", "a brown dog": "other", "": "other"}
    assert {answer: answer_type(answer) for answer in kinds} == kinds


def test_blind_predictions_use_training_only():
    training = [Question("s", "what color?", "red")] * 2 + [Question("s", "what color?", "blue")]
    training += [Question("s", "is it?", "yes"), Question("s", "is it?", "no")]
    asked = [Question("t", text, "blue") for text in ("what color?", "is it?", "never seen")]
    assert blind_predictions(asked, training) == ["red", "no", "red"]


def test_answers_are_normalised():
    assert normalise(" Yes. ") == "yes"
    assert normalise("a. b") == "a. b"
