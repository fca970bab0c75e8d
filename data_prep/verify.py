"""Checks of one sample before it is stored: every image decoded once, every dialogue well formed.

`python -m data_prep.verify SPLIT_FOLDER ...` compares prepared shards with their checksums, e.g. after a copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.arguments import Parser
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import MAX_PIXELS, describe, open_image
from data_prep.store.sample import ROLES, Dialogue, Dropped, Sample
from data_prep.store.split import Split
from data_prep.text.dialogues import IMAGE_TOKEN, placed_images


def check_dialogue(dialogue: Dialogue, images: int = 0) -> None:
    """Roles alternate user/assistant after at most one system turn, and every answer says something.

    Args:
        dialogue: Its turns.
        images: How many images it is about; the user's turns hold as many image tokens, or none.

    Raises:
        Defect: naming what is wrong and in which turn.
    """
    if not isinstance(dialogue, list) or not dialogue:
        raise Defect("conversation empty")
    for number, turn in enumerate(dialogue):
        content = turn.get("content")
        if not isinstance(content, str):
            raise Defect("turn without text", f"turn {number}: {type(content).__name__}")
        if turn.get("role") not in ROLES:
            raise Defect("unknown role", f"turn {number}: {turn.get('role')!r}")
        if not is_text(content):
            raise Defect("text is not valid Unicode", f"turn {number}")
        if "\0" in content:
            raise Defect("text holds a NUL character", f"turn {number}")
        if IMAGE_TOKEN in content and (turn["role"] != "user" or placed_images(dialogue) != images):
            raise Defect("image token left in text", f"turn {number}")
        if turn["role"] == "assistant" and not content.strip():
            raise Defect("answer empty", f"turn {number}")
    roles = [turn["role"] for turn in dialogue]
    spoken = roles[roles[0] == "system" :]
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or spoken != expected[: len(spoken)]:
        raise Defect("roles do not alternate", " ".join(roles))
    if spoken[-1] != "assistant":
        raise Defect("no final answer", " ".join(roles))


def is_text(text: str) -> bool:
    """Whether it has no lone surrogates, which no file can hold as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


TokenCounter = Callable[[Dialogue], tuple[int, int, int]]
"""Tokens of a dialogue, template included, how many of them are supervised, and how many of these unknown."""


@dataclass
class Verifier:
    """Checks samples and counts what it saw.

    Attributes:
        max_pixels: Of one image.
        min_side: Shortest accepted side in pixels.
        tokens: Of a dialogue (template included), how many are supervised and of these unknown, for the statistics and
            `max_length`; raises `DataError` for one that the template cannot render. None: not counted.
        max_length: Longest accepted dialogue in tokens; none: any.
        statistics: Counters by name, for the manifest.
    """

    max_pixels: int = MAX_PIXELS
    min_side: int = 2
    tokens: TokenCounter | None = None
    max_length: int | None = None
    statistics: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))

    def check(self, sample: Sample) -> Dropped | None:
        """What is wrong with `sample`; none when it is sound, and then it is counted."""
        seen: list[tuple[str, str, int]] = []
        try:
            if not sample.id:
                raise Defect("no id")
            if not is_text(sample.id + sample.source):
                raise Defect("id is not valid Unicode", ascii(sample.id))
            if not sample.conversations:
                raise Defect("conversation empty")
            for number, dialogue in enumerate(sample.conversations):
                try:
                    check_dialogue(dialogue, len(sample.images))
                except Defect as defect:
                    where = f"dialogue {number}" if len(sample.conversations) > 1 else ""
                    raise Defect(defect.reason, ", ".join(filter(None, (where, defect.detail)))) from None
            if sample.references and len(sample.references) != len(sample.conversations):
                raise Defect("references differ from dialogues", f"{len(sample.references)} references")
            for data in sample.images:
                image = open_image(data, self.max_pixels)
                if min(image.size) < self.min_side:
                    raise Defect("image too small", f"{image.width} x {image.height} pixels")
                seen += [(f"image {name}", value, 1) for name, value in describe(image).items()]
                seen.append(("image shortest side", bucket(min(image.size)), 1))
                seen.append(("image kilobytes", bucket(len(data) // 1000), 1))
            for dialogue in sample.conversations:
                seen.append(("dialogue characters", bucket(sum(len(turn["content"]) for turn in dialogue)), 1))
                if self.tokens is not None:
                    seen += self._count_tokens(self.tokens, dialogue)
        except Defect as error:
            return Dropped(sample.id, error.reason, error.detail)
        seen.append(("images per sample", f"{len(sample.images):04d}", 1))
        seen.append(("dialogues per sample", bucket(len(sample.conversations)), 1))
        for each in seen:
            self.count(*each)
        return None

    def _count_tokens(self, tokens: TokenCounter, dialogue: Dialogue) -> list[tuple[str, str, int]]:
        try:
            length, supervised, unknown = tokens(dialogue)
        except DataError as error:
            raise Defect("template cannot render it", str(error)) from error
        if self.max_length is not None and length > self.max_length:
            raise Defect("too long", f"{length} tokens, at most {self.max_length} are accepted")
        histogram = ("dialogue tokens", bucket(length, 3), 1)
        counts = [("tokens", "all", length), ("tokens", "supervised", supervised)]
        return [histogram, *counts, *([("tokens", "unknown", unknown)] if unknown else [])]

    def count(self, name: str, value: str, number: int = 1) -> None:
        """Add to a statistic."""
        self.statistics[name][value] += number


def bucket(value: int, bits: int = 1) -> str:
    """Name of the histogram bin of `value`: its first `bits` binary digits, zero-padded to sort as text.

    One digit makes powers of two, three make four bins between two of them.
    """
    rest = max(0, value.bit_length() - bits)
    return f"{value >> rest << rest:07d}"


def main() -> int:
    """Compare prepared splits with their checksums."""
    parser = Parser(prog="python -m data_prep.verify", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="SPLIT_FOLDER")
    for folder in parser.parse_args().folders:
        split = Split(folder)
        split.verify()
        print(f"{folder}: {len(split.manifest.shards)} shards, {len(split)} samples as prepared")
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
