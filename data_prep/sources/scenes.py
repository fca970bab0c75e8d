"""Composed scenes: pictures made from named cut-outs with transparency on backgrounds, with captions and questions.

Any number of pictures, each a function of the seed and its number alone, made straight into shards by many workers. The
cut-outs are a folder with `cutouts.json` (`python -m data_prep.parts.cutouts` makes two such folders) or of
`CATEGORY/NAME.png`.

    caption_train, caption_val   a sentence per picture
    train, val                   questions about new scenes of the same objects
    test                         the same, with other scenes and other wordings for half of the questions
    test_objects                 objects that no training picture shows, of the same categories
    test_moved                   pairs in which the two objects that are asked for change places: the answer turns
    test_style                   objects drawn in another style (`source.test_style`), where there is one

Questions are of the kinds in `QUESTIONS`. Each question text has all of its answers equally often, so that a reader of
the text alone is at chance: half of the objects that are asked for are not there, sides and orders are drawn at random.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from common.settings import setting
from data_prep.sources import below
from data_prep.store.errors import DataError
from data_prep.store.images import open_image, read_image, with_alpha
from data_prep.store.sample import Dialogue, Reference, Sample
from data_prep.text.dialogues import exchange

LIST = "cutouts.json"
MAKE = "python -m data_prep.parts.cutouts makes one"
COLORS = {
    "red": (214, 40, 40), "orange": (240, 140, 30), "yellow": (245, 215, 60), "green": (50, 160, 70),
    "blue": (45, 95, 200), "purple": (130, 70, 170), "white": (245, 245, 245), "black": (25, 25, 25),
}  # fmt: skip
"""Colours of the discs that objects may stand on."""
SIDES = ("left", "right", "top", "bottom")
HELD_OUT = 0.15
"""Share of the objects of every category, at least three, that only `test_objects` shows."""


@dataclass(frozen=True)
class Cutout:
    """One object: its file, its name, its category and the style it is drawn in."""

    file: str
    name: str
    category: str
    style: str = ""


@dataclass(frozen=True)
class Placed:
    """One object of a scene: where its middle is and its size (shares of the side), and the colour of its disc."""

    what: Cutout
    x: float
    y: float
    size: float
    color: str | None


@dataclass
class Scenes:
    """The source.

    Attributes:
        path: Folder of the cut-outs.
        samples: Pictures of `train`; `caption_train` has as many others, the other splits a tenth, at least 50.
        names: Of every category at most, the shortest of letters alone first; null: all.
        objects: In a picture at most.
        side: Of the pictures, in pixels.
        questions: Questions about a picture at most, each of another kind.
        style: Only cut-outs of this style; null: all of them, but for those of `test_style`.
        test_style: Style that only `test_style` shows; null: there is no such split.
        seed: Chooses everything.
        samples_per_shard: Pictures in a unit of work.
    """

    path: Path = setting(path=True)
    samples: int = setting(4000, within="[1, 1e10]")
    names: int | None = setting(None, within="[6, 1e6]")
    objects: int = setting(4, within="[2, 4]")
    side: int = setting(112, within="[8, 8192]")
    questions: int = setting(4, within="[1, 8]")
    style: str | None = None
    test_style: str | None = None
    seed: int = setting(0, within="[0, 4294967295]")
    samples_per_shard: int = setting(1000, within="[1, 1e7]")

    def made_from(self) -> dict[str, Any]:
        """The list of cut-outs, its licences, and the settings."""
        cutouts, licences = _cutouts(self.path)
        settings = {name: value for name, value in vars(self).items() if name != "path"}
        listed = hashlib.sha256(repr(cutouts).encode()).hexdigest()
        return {"source": "scenes", "reader": 4, "cutouts": listed, "licences": licences, **settings}

    def plan(self) -> dict[str, list[list[int]]]:
        """Units `[first, end]`."""
        few = max(50, self.samples // 10)
        sizes = {"caption_train": self.samples, "caption_val": few, "train": self.samples, "val": few, "test": few}
        sizes |= {"test_objects": few, "test_moved": 2 * few}
        if self.test_style is not None:
            sizes["test_style"] = few
        step = self.samples_per_shard
        return {name: [[at, min(at + step, size)] for at in range(0, size, step)] for name, size in sizes.items()}

    def read(self, split: str, unit: list[int]) -> Iterator[Sample]:
        """Pictures of a range of numbers."""
        objects = self._objects(split)
        for number in range(*unit):
            yield self._sample(split, number, Random(f"{self.seed}/{split}/{number}"), objects)

    def _objects(self, split: str) -> dict[str, list[Cutout]]:
        """Cut-outs that a split shows, by category; categories of fewer than six are left out."""
        cutouts, _ = _cutouts(self.path)
        if split == "test_style":
            chosen = [each for each in cutouts if each.style == self.test_style]
        elif self.style is not None:
            chosen = [each for each in cutouts if each.style == self.style]
        else:
            chosen = [each for each in cutouts if each.style != self.test_style]
        by_name: dict[str, dict[str, list[Cutout]]] = {}
        for each in chosen:
            by_name.setdefault(each.category, {}).setdefault(each.name, []).append(each)
        found = {}
        for category, named in sorted(by_name.items()):
            known = sorted(named, key=_plainness)[: self.names]
            names = sorted(known, key=lambda name: hashlib.sha256(f"{self.seed}/{name}".encode()).digest())
            cut = max(3, round(len(names) * HELD_OUT))
            kept = names[:cut] if split == "test_objects" else names[cut:]
            if len(names) >= cut + 3:
                found[category] = [cutout for name in kept for cutout in named[name]]
        count = len({each.name for listed in found.values() for each in listed})
        if len(found) < 2 or count < 6:
            raise DataError(f"{self.path}: scenes need 2 categories and 6 names; {split} has {len(found)} and {count}")
        return found

    def _moved(self, number: int, objects: dict[str, list[Cutout]]) -> Sample:
        """One of a pair: in 2 n + 1 the two objects that are asked for stand where the other was in 2 n."""
        random = Random(f"{self.seed}/test_moved/{number // 2}")
        scene = compose(random, objects, random.randint(2, self.objects))
        one, other = random.sample(range(len(scene)), 2)
        if number % 2:
            first, second = scene[one], scene[other]
            scene[one] = replace(first, x=second.x, y=second.y)
            scene[other] = replace(second, x=first.x, y=first.y)
        asked = _beside(scene[one], scene[other], random.randrange(2))
        assert asked is not None
        image = self._draw(scene, random)
        reference = Reference(kind="where, moved", answers=[], match="exact")
        return Sample(f"scenes/test_moved/{number}", [image], [exchange(*asked)], "scenes", [reference])

    def _sample(self, split: str, number: int, random: Random, objects: dict[str, list[Cutout]]) -> Sample:
        if split == "test_moved":
            return self._moved(number, objects)
        name = f"scenes/{split}/{number}"
        if split.startswith("caption_"):
            scene = compose(random, objects, random.randint(1, 2))
            return Sample(name, [self._draw(scene, random)], [_caption(random, scene)], "scenes")
        scene = compose(random, objects, random.randint(1, self.objects))
        dialogues: list[Dialogue] = []
        references: list[Reference] = []
        for kind in random.sample(sorted(QUESTIONS), len(QUESTIONS)):
            if len(dialogues) == self.questions:
                break
            wording = random.randrange(3) if split.startswith("test") and random.random() < 0.5 else random.randrange(2)
            asked = QUESTIONS[kind](random, scene, objects, wording)
            if asked is not None:
                dialogues.append(exchange(*asked))
                kind = f"{kind}, new wording" if wording == 2 else kind
                references.append(Reference(kind=kind, answers=[], match="exact"))
        return Sample(name, [self._draw(scene, random)], dialogues, "scenes", references)

    def _draw(self, scene: list[Placed], random: Random) -> bytes:
        """The picture of a scene as a PNG file."""
        base = [random.randrange(150, 256) for _ in range(3)]
        other = [max(0, value - random.randrange(60)) for value in base]
        shade = Image.linear_gradient("L").resize((self.side, self.side)).rotate(random.choice((0, 90, 180, 270)))
        canvas = ImageOps.colorize(shade, tuple(base), tuple(other))
        for placed in scene:
            size = max(8, round(placed.size * self.side))
            corner = round(placed.x * self.side - size / 2), round(placed.y * self.side - size / 2)
            if placed.color is not None:
                canvas.paste(COLORS[placed.color], corner, _disc().resize((size, size)))
                inner = round(size * 0.72)
                corner = corner[0] + (size - inner) // 2, corner[1] + (size - inner) // 2
                size = inner
            cutout = ImageOps.contain(_picture(self.path, placed.what.file), (size, size))
            at = corner[0] + (size - cutout.width) // 2, corner[1] + (size - cutout.height) // 2
            canvas.paste(cutout, at, cutout.getchannel("A"))
        stream = io.BytesIO()
        canvas.save(stream, "PNG")
        return stream.getvalue()


def _plainness(name: str) -> tuple[bool, int, int, str]:
    """Sorts names: words of letters before others, few before many, short before long."""
    return not name.replace(" ", "").isalpha(), len(name.split()), len(name), name


@cache
def _disc() -> Image.Image:
    mask = Image.new("L", (256, 256))
    ImageDraw.Draw(mask).ellipse((4, 4, 251, 251), fill=255)
    return mask


@cache
def _picture(folder: Path, file: str) -> Image.Image:
    """A cut-out, cropped to what is not transparent."""
    image = open_image(read_image(below(folder, file)))
    clear = with_alpha(image) or image.convert("RGBA")
    return clear.crop(clear.getchannel("A").getbbox() or (0, 0, *clear.size))


@cache
def _cutouts(folder: Path) -> tuple[tuple[Cutout, ...], tuple[str, ...]]:
    """All cut-outs of a folder, and their licences.

    Raises:
        DataError: there are none, or the list cannot be read.
    """
    if (file := folder / LIST).is_file():
        try:
            listed = json.loads(file.read_text(encoding="utf-8"))
            found = tuple(Cutout(**each) for each in listed["cutouts"])
            return found, tuple(str(licence) for licence in listed["licences"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file} is no list of cut-outs ({error}); {MAKE}") from error
    files = sorted(folder.glob("*/*.png"))
    if not files:
        raise DataError(f"{folder} has no {LIST} and no CATEGORY/NAME.png; {MAKE}")
    return tuple(Cutout(f"{f.parent.name}/{f.name}", f.stem.replace("_", " "), f.parent.name) for f in files), ()


def compose(random: Random, objects: dict[str, list[Cutout]], count: int) -> list[Placed]:
    """A scene of `count` objects of different names, in different cells of a grid of two by two.

    Every object has a cell of its own, so that left, right, above and below are never in doubt.
    """
    categories = sorted(objects)
    chosen: list[Cutout] = []
    while len(chosen) < count:
        each = random.choice(objects[random.choice(categories)])
        if each.name not in {other.name for other in chosen}:
            chosen.append(each)
    cells = random.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], count)
    colors = random.sample(sorted(COLORS), count)
    placed = []
    for each, (x, y), color in zip(chosen, cells, colors, strict=True):
        shift = random.uniform(-0.03, 0.03), random.uniform(-0.03, 0.03)
        on_disc = color if random.random() < 0.7 else None
        placed.append(Placed(each, x + shift[0], y + shift[1], random.uniform(0.34, 0.44), on_disc))
    return placed


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _caption(random: Random, scene: list[Placed]) -> Dialogue:
    """A sentence whose beginning is the user's, so that a frozen language model expects what the picture supplies.

    Objects come as one reads, from the top left to the bottom right: every word follows from the picture.
    """
    ordered = sorted(scene, key=lambda each: (each.y > 0.5, each.x))
    opening = random.choice(("The picture shows", "In the picture there is"))
    return exchange(opening, " and ".join(_described(each) for each in ordered) + ".")


def _described(each: Placed) -> str:
    disc = f" on {each.color}" if each.color else ""
    return f"{_a(each.what.name)}{disc} at the {_place(each)}"


Asked = tuple[str, str] | None
Question = Callable[[Random, list[Placed], dict[str, list[Cutout]], int], Asked]


def _absent(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]]) -> Cutout:
    """An object that the scene does not show."""
    shown = {each.what.name for each in scene}
    while True:
        each = random.choice(objects[random.choice(sorted(objects))])
        if each.name not in shown:
            return each


def _exists(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    there = random.random() < 0.5
    what = random.choice(scene).what if there else _absent(random, scene, objects)
    forms = ("Is there {} in the picture?", "Does the picture show {}?", "Can you see {} here?")
    return forms[wording].format(_a(what.name)), "yes" if there else "no"


def _side(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    """Which of two: the answer is a side, which no text tells."""
    if len(scene) < 2:
        return None
    one, other = random.sample(scene, 2)
    return _beside(one, other, wording)


def _beside(one: Placed, other: Placed, wording: int) -> Asked:
    across = abs(one.x - other.x) > 0.2
    if not across and abs(one.y - other.y) <= 0.2:
        return None
    answer = ("left" if one.x < other.x else "right") if across else ("above" if one.y < other.y else "below")
    ways = "left or right of" if across else "above or below"
    forms = ("Is the {0} {2} the {1}?", "The {0}: {2} the {1}?", "Seen from the {1}, is the {0} {2} it?")
    return forms[wording].format(one.what.name, other.what.name, ways), answer


def _color(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    colored = [each for each in scene if each.color]
    if not colored:
        return None
    each = random.choice(colored)
    forms = ("What colour is the disc of the {}?", "On what colour is the {}?", "Which colour is behind the {}?")
    return forms[wording].format(each.what.name), str(each.color)


def _which(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    """One of two that are named in either order is in the picture."""
    here, absent = random.choice(scene).what.name, _absent(random, scene, objects).name
    first, second = random.sample([here, absent], 2)
    forms = ("Which is in the picture, {} or {}?", "What is shown, {} or {}?", "{} or {}: which one do you see?")
    return forms[wording].format(first, second), here


def _what_at(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    each = random.choice(scene)
    forms = ("What is at the {}?", "What do you see at the {}?", "Name the object at the {}.")
    return forms[wording].format(_place(each)), each.what.name


def _category(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    each = random.choice(scene)
    forms = ("What kind of thing is at the {}?", "To which category does the object at the {} belong?",
             "The thing at the {}: of what kind is it?")  # fmt: skip
    return forms[wording].format(_place(each)), each.what.category


def _color_at(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    colored = [each for each in scene if each.color]
    if not colored:
        return None
    each = random.choice(colored)
    forms = ("What colour is the disc at the {}?", "Which colour is at the {}?", "At the {}, what colour is the disc?")
    return forms[wording].format(_place(each)), str(each.color)


def _count(random: Random, scene: list[Placed], objects: dict[str, list[Cutout]], wording: int) -> Asked:
    forms = ("How many objects are in the picture?", "How many things do you see?", "Count the objects.")
    return forms[wording], str(len(scene))


def _place(each: Placed) -> str:
    return f"{'top' if each.y < 0.5 else 'bottom'} {'left' if each.x < 0.5 else 'right'}"


QUESTIONS: dict[str, Question] = {
    "exists": _exists, "where": _side, "colour": _color, "which": _which, "what": _what_at, "category": _category,
    "attribute at a place": _color_at, "how many": _count,
}  # fmt: skip
"""Kinds of questions; each gives a text and its answer, or none where a scene allows none."""
