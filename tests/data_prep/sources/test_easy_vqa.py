"""easy-VQA: what ends up where, and captions that know no more than the training questions say."""

import hashlib
import json
import sys

import pytest

from common.errors import ConfigError
from data_prep import __main__ as entry
from data_prep.sources.easy_vqa import CAPTIONS, COLORS, SHAPES, EasyVQA, Facts, answer_type, captions, facts, kind
from data_prep.store.errors import DataError
from data_prep.store.split import Split

SPLITS = ("caption_train", "caption_val", "train", "open_train", "val", "test")


@pytest.fixture(scope="module")
def prepared(part, tmp_path_factory):
    """Every split of the real data set, made by the entry point."""
    root = tmp_path_factory.mktemp("data")
    argv, sys.argv = sys.argv, ["data_prep", "source=easy_vqa", f"root={root}", f"source.path={part('easy_vqa')}"]
    try:
        assert entry.main() == 0
    finally:
        sys.argv = argv
    return {split: Split(root / "easy_vqa" / split) for split in SPLITS}


def hashes(split):
    return {hashlib.sha256(image).hexdigest() for sample in split for image in sample.images}


def test_no_test_image_is_trained_on_and_validation_is_by_image(prepared, part):
    held_out = {hashlib.sha256(f.read_bytes()).hexdigest() for f in (part("easy_vqa") / "test/images").glob("*.png")}
    assert len(held_out) == 1000
    found = {split: hashes(prepared[split]) for split in SPLITS}
    assert found["test"] == held_out
    for split in ("caption_train", "caption_val", "train", "val"):
        assert found[split] and not found[split] & held_out
    assert not found["train"] & found["val"]
    assert found["caption_train"] < found["train"] and found["caption_val"] < found["val"]
    assert len(found["train"] | found["val"]) == 4000


def test_every_official_question_arrives_once(prepared, part):
    for parts, file in ((("train", "val"), "train"), (("test",), "test")):
        official = sorted(map(tuple, json.loads((part("easy_vqa") / file / "questions.json").read_text())))
        ours = []
        for split in parts:
            for sample in prepared[split]:
                number = int(sample.id.rsplit("/", 1)[1])
                for user, assistant in sample.conversations:
                    assert (user["role"], assistant["role"]) == ("user", "assistant")
                    ours.append((user["content"], assistant["content"], number))
        assert sorted(ours) == official


def test_open_questions_are_the_training_questions_with_more_than_two_answers(prepared):
    def questions(split):
        return sorted((s.id, q["content"], a["content"]) for s in prepared[split] for q, a in s.conversations)

    assert questions("open_train") == [q for q in questions("train") if q[2] not in ("yes", "no")]


def test_yes_no_questions_say_what_they_ask_about(prepared):
    """Independent reference: the word that the question names."""
    found = set()
    for split in ("train", "val", "test"):
        for sample in prepared[split]:
            for (question, answer), reference in zip(sample.conversations, sample.references, strict=True):
                words = set(question["content"].rstrip("?").split())
                about = "color" if words & set(COLORS) else "shape"
                if answer["content"] in ("yes", "no"):
                    assert reference["kind"] == f"yesno: {about}" and words & {*COLORS, *SHAPES}
                found.add(reference["kind"])
    assert found == {"shape", "color", "yesno: shape", "yesno: color"}


def test_captions_use_only_training_questions(part, tmp_path):
    """Without any test question on disk, and whatever the test questions say, the captions are the same."""
    raw = part("easy_vqa")
    (tmp_path / "train").symlink_to(raw / "train")
    alone, full = EasyVQA(tmp_path), EasyVQA(raw)
    for split in ("caption_train", "caption_val"):
        assert list(alone.read(split, 0)) == list(full.read(split, 0))


def test_captions_are_true(prepared, part):
    """Independent reference: no training question about the image contradicts its caption."""
    asked = {}
    for question, answer, number in json.loads((part("easy_vqa") / "train/questions.json").read_text()):
        asked.setdefault(number, []).append((question.rstrip("?").split(), answer))
    for split in ("caption_train", "caption_val"):
        for sample in prepared[split]:
            words = set(sample.conversations[0][1]["content"].rstrip(".").split())
            for question, answer in asked[int(sample.id.rsplit("/", 1)[1])]:
                named = set(question) & {*COLORS, *SHAPES}
                if answer not in ("yes", "no"):
                    assert answer in words and named <= words
                else:
                    shown = (answer == "yes") != bool({"not", "no"} & set(question))
                    assert (named <= words) == shown


def test_second_run_does_nothing(part, tmp_path, capsys, monkeypatch):
    argv = ["data_prep", "source=easy_vqa", f"root={tmp_path}", f"source.path={part('easy_vqa')}"]
    monkeypatch.setattr(sys, "argv", argv)
    entry.main()
    assert capsys.readouterr().out.count(": made: ") == len(SPLITS)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    entry.main()
    assert capsys.readouterr().out.count("up to date") == len(SPLITS)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    monkeypatch.setattr(sys, "argv", [*argv, "source.captions=short", "overwrite=true"])
    entry.main()
    assert capsys.readouterr().out.count(": made: ") == len(SPLITS)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("is there a red shape?", "yes", Facts(color="red")),
        ("is there a red shape?", "no", Facts()),
        ("is there not a red shape in the image?", "no", Facts(color="red")),
        ("does the image not contain a circle?", "no", Facts(shape="circle")),
        ("does the image not contain a circle?", "yes", Facts()),
        ("is no teal shape present?", "no", Facts(color="teal")),
        ("is a triangle present?", "yes", Facts(shape="triangle")),
        ("what is the blue shape?", "rectangle", Facts("rectangle", "blue")),
        ("what is the color of the circle?", "gray", Facts("circle", "gray")),
        ("what color is the shape?", "gray", Facts(color="gray")),
        ("what shape does the image contain?", "circle", Facts(shape="circle")),
    ],
)
def test_facts_of_one_question(question, answer, expected):
    assert facts([(question, answer)]) == expected


def test_contradiction_and_unknown_forms_are_errors():
    with pytest.raises(DataError, match="contradict each other: color is .*'blue', 'red'"):
        facts([("what color is the shape?", "red"), ("is there a blue shape?", "yes")])
    with pytest.raises(DataError, match="unknown form: 'is it nice"):
        facts([("is it nice?", "yes")])
    with pytest.raises(DataError, match="unknown form: 'is it nice"):
        kind("is it nice?", "yes")
    with pytest.raises(DataError, match="no answer 'maybe'"):
        answer_type("maybe")
    with pytest.raises(DataError, match="captions=long.*short, sentences"):
        captions(Facts("circle", "red"), "long")


def test_caption_styles():
    assert captions(Facts(shape="circle"), "short") == []
    for style, templates in CAPTIONS.items():
        made = captions(Facts("circle", "red"), style)
        assert len(made) == len(templates)
        stated = [{word for word in ("red", "circle") if word in d[1]["content"]} for d in made]
        assert all(stated) and set.union(*stated) == {"red", "circle"}
        assert style == "facts" or all(len(words) == 2 for words in stated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["source=easy_vqa", "source.caption=short"],
            r"unknown configuration key `source.caption`; did you mean `source\.",
        ),
        (["source=easy_vqa", "rooot=x"], r"unknown configuration key `rooot`; did you mean `root`\?"),
        (["source=easy_vqa", "workers=many"], "configuration key `workers`: .*'many'"),
        (["source=easy_vqa", "task=3/3"], "task=3/3: write i/n"),
        (["source=easy_vqa", "options.on_error=skip"], "on_error=skip: choose one of fail, drop"),
        (["source=webdataset"], "configuration key `source.path` has no value; set it on the command line"),
        (["source=capsfusion", "source.samples=many"], "configuration key `source.samples`: Value 'many'"),
        (["source=llava_mix665k", "source.samples_per_shard=0"], "source.samples_per_shard=0: must be at least 1"),
        (["source=capsfusion", "source.path=/nowhere"], "/nowhere holds no shard of img2dataset"),
        (["source=easyvqa"], "source=easyvqa: no such source; there are .*easy_vqa"),
        (["source=easy_vqa", "source.path=/nowhere"], "/nowhere/train/questions.json is missing"),
        ([], "Say source=NAME"),
    ],
)
def test_bad_command_lines(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["data_prep", *arguments, f"root={tmp_path}"])
    with pytest.raises((ConfigError, DataError), match=message):
        entry.main()
