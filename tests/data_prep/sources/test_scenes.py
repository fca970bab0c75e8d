"""Composed scenes: deterministic, true, balanced, and split by objects, wordings and styles."""

import io
import json
import re
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.prepare import prepare
from data_prep.sources.scenes import COLORS, QUESTIONS, Scenes, compose
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from tests.data_prep.miniature import encoded

NAMES = {
    "animal": ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"],
    "food": ["bun", "egg", "fig", "jam", "nut", "pie", "rye", "yam"],
}


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory):
    """A folder of sixteen names in two categories and two styles: discs and squares, transparent around."""
    folder, listed = tmp_path_factory.mktemp("cutouts"), []
    for style, draw in (("round", ImageDraw.ImageDraw.ellipse), ("square", ImageDraw.ImageDraw.rectangle)):
        for category, names in NAMES.items():
            for number, name in enumerate(names):
                picture = Image.new("RGBA", (40, 40))
                draw(ImageDraw.Draw(picture), (4, 4, 35, 35), fill=(number * 30, 90, len(category) * 30, 255))
                (folder / f"{style}-{name}.png").write_bytes(encoded(picture, "png"))
                listed.append({"file": f"{style}-{name}.png", "name": name, "category": category, "style": style})
    (folder / "cutouts.json").write_text(json.dumps({"licences": ["ours"], "cutouts": listed}))
    return folder


@pytest.fixture(scope="module")
def made(cutouts, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "scenes"
    source = Scenes(cutouts, samples=200, side=48, test_style="square", samples_per_shard=100)
    return out, prepare(source, out).manifests


def words(split):
    return {word.strip("?.,") for sample in split for talk in sample.conversations for turn in talk
            for word in turn["content"].split()}  # fmt: skip


def test_splits_hold_out_objects_and_styles(made, cutouts):
    out, manifests = made
    assert {name: manifest.samples for name, manifest in manifests.items()} == {
        "caption_train": 200, "caption_val": 50, "train": 200, "val": 50, "test": 50, "test_objects": 50,
        "test_moved": 100, "test_style": 50,
    }  # fmt: skip
    names = {name for listed in NAMES.values() for name in listed}
    shown = {split: words(Split(out / split)) & names for split in manifests}
    assert shown["test_objects"] and not shown["test_objects"] & (shown["train"] | shown["caption_train"])
    assert shown["test_style"] <= shown["train"] and manifests["train"].made_from["licences"] == ("ours",)
    new = [r["kind"] for s in Split(out / "test") for r in s.references if "new wording" in r["kind"]]
    assert new and not any("new wording" in r["kind"] for s in Split(out / "train") for r in s.references)


def test_a_reader_of_the_text_alone_is_at_chance(cutouts):
    """Of every question text, its most frequent answer in one half of many scenes is right by chance in the other."""
    objects = Scenes(cutouts, test_style="square")._objects("train")
    random = Random(0)
    for kind, chance in {
        "exists": 1 / 2, "where": 1 / 2, "which": 1 / 2, "how many": 1 / 4, "category": 1 / 2,
        "colour": 1 / len(COLORS), "attribute at a place": 1 / len(COLORS), "what": 1 / 10,
    }.items():  # fmt: skip
        answers, right, count = defaultdict(Counter), 0, 0
        for number in range(8_000):
            scene = compose(random, objects, random.randint(1, 4))
            asked = QUESTIONS[kind](random, scene, objects, random.randrange(2))
            if asked is None:
                continue
            text, answer = asked
            if number < 6_000:
                answers[text][answer] += 1
            elif answers[text]:
                right += answers[text].most_common(1)[0][0] == answer
                count += 1
        assert count > 400 and abs(right / count - chance) < 0.04, (kind, right / count)


def pixels(sample, text, color):
    """How many pixels of the quarter that a text names have nearly this colour."""
    image = np.asarray(Image.open(io.BytesIO(sample.images[0])).convert("RGB")).astype(int)
    rows = slice(0, 24) if "top" in text else slice(24, 48)
    columns = slice(0, 24) if "left" in text else slice(24, 48)
    return (np.abs(image[rows, columns] - COLORS[color]).max(-1) < 6).sum()


def test_pictures_are_as_the_questions_say(made):
    """The colour of a disc at a place is the colour that most of its rim has."""
    out, _ = made
    checked = 0
    for sample in Split(out / "train"):
        for talk, reference in zip(sample.conversations, sample.references, strict=True):
            if reference["kind"] == "attribute at a place":
                assert pixels(sample, talk[0]["content"], talk[1]["content"]) > 20
                checked += 1
    assert checked > 40


def test_captions_say_what_stands_where(made):
    """In reading order, with the colour that the disc has there."""
    order, checked = ["top left", "top right", "bottom left", "bottom right"], 0
    for sample in Split(made[0] / "caption_train"):
        ((opening, said),) = [[turn["content"] for turn in talk] for talk in sample.conversations]
        assert opening in ("The picture shows", "In the picture there is")
        found = re.findall(r"(?:an?) (\w+)(?: on (\w+))? at the (\w+ \w+)", said)
        places = [order.index(place) for _, _, place in found]
        assert found and places == sorted(set(places)) and said.count(" and ") == len(found) - 1
        for _, color, place in found:
            if color:
                assert pixels(sample, place, color) > 20
                checked += 1
    assert checked > 40


def test_a_picture_follows_from_the_seed_and_its_number(made, cutouts):
    out, _ = made
    source = Scenes(cutouts, samples=200, side=48, test_style="square", samples_per_shard=7)
    split = Split(out / "val")
    assert list(source.read("val", [10, 30])) == [split[number] for number in range(10, 30)]
    other = next(source.read("train", [10, 11]))
    assert other.images != split[10].images
    assert next(Scenes(cutouts, side=48, test_style="square", seed=1).read("val", [10, 11])).images != split[10].images


def test_of_a_moved_pair_the_question_stays_and_the_answer_turns(made):
    split = list(Split(made[0] / "test_moved"))
    turned = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for one, other in zip(split[::2], split[1::2], strict=True):
        (asked, said), (again, now) = one.conversations[0], other.conversations[0]
        assert asked == again and now["content"] == turned[said["content"]] and one.images != other.images
        before, after = (np.asarray(Image.open(io.BytesIO(s.images[0])).convert("RGB")) for s in (one, other))
        assert (before == after).all(-1).mean() > 0.2  # the background is the same


def test_fewer_names_and_fewer_objects_make_easier_scenes(cutouts):
    easy = Scenes(cutouts, samples=60, names=6, objects=2)
    shown = {kind: {each.name for each in listed} for kind, listed in easy._objects("train").items()}
    held = {kind: {each.name for each in listed} for kind, listed in easy._objects("test_objects").items()}
    for category, names in NAMES.items():
        kept = sorted(names, key=lambda name: (len(name), name))[:6]
        assert sorted(shown[category] | held[category]) == sorted(kept) and not shown[category] & held[category]
    counts = Counter(
        talk[1]["content"]
        for sample in easy.read("train", [0, 60])
        for talk in sample.conversations
        if talk[0]["content"] in ("How many objects are in the picture?", "How many things do you see?")
    )
    assert set(counts) == {"1", "2"}


def test_what_is_wrong_is_named(cutouts, tmp_path):
    with pytest.raises(DataError, match="has no cutouts.json and no CATEGORY/NAME.png"):
        prepare(Scenes(tmp_path), tmp_path / "out")
    (tmp_path / "cutouts.json").write_text('{"cutouts": [{"file": "x"}]}')
    with pytest.raises(DataError, match="is no list of cut-outs"):
        prepare(Scenes(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="scenes need 2 categories and 6 names; caption_train has 0 and 0"):
        prepare(Scenes(cutouts, style="oil"), tmp_path / "out")
    outside = {"licences": [], "cutouts": [
        {"file": "../secret.png", "name": f"{c}{n}", "category": c, "style": ""} for c in "ab" for n in range(9)
    ]}  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cutouts.json").write_text(json.dumps(outside))
    with pytest.raises(DataError, match="leads out of this folder"):
        prepare(Scenes(tmp_path / "in", samples=2), tmp_path / "out")
