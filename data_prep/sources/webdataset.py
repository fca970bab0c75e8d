"""Any WebDataset of images with text: tars whose members `KEY.jpg`, `KEY.txt` or `KEY.json` make a sample."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.settings import setting
from data_prep.sources import SPLITS, below, each, tars
from data_prep.store.errors import DataError, Defect
from data_prep.store.sample import Count, Dropped, Sample
from data_prep.text.dialogues import from_text_or_turns

OTHERS = ("readme", "license", "licence", "copying", "notice", "changelog", "authors", "citation")
"""Names of members that tell about a data set and are no samples of it."""
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass
class WebDataset:
    """The source; one tar is one unit of work.

    Attributes:
        path: Folder of the tars, searched through all its folders. Where their folders or names say `train`, `val` (or
            `validation`) and `test`, each becomes a split; they are never mixed.
        image: Suffix of the image's member; null: the one that is an image's.
        text: Suffix of the text's member, or `json:KEY` for a value in the member `KEY.json`: a caption, or a list
            of turns `{"from", "value"}` or `{"role", "content"}`, or of exchanges.
        label: Source of the samples.
        split: Only this one of the splits; where the tars do not say which they are of, its name. Null: all.
    """

    path: Path = setting(path=True)
    image: str | None = None
    text: str = "txt"
    label: str = "webdataset"
    split: str | None = None

    def made_from(self) -> dict[str, Any]:
        """Names and sizes of the tars, and the settings."""
        settings = {"image": self.image, "text": self.text, "label": self.label, "split": self.split}
        return {"source": "webdataset", "tars": tars.listing(self.path, tars.find(self.path)), **settings}

    def plan(self) -> dict[str, list[str]]:
        """Units are names of tars.

        Raises:
            DataError: no tars, none of the split, or some that say of which split they are beside others that do not.
        """
        names = [str(file.relative_to(self.path)) for file in tars.find(self.path)]
        found: dict[str | None, list[str]] = {}
        for name in names:
            found.setdefault(split_of(name), []).append(name)
        if list(found) == [None]:
            return {self.split or "train": names}
        if None in found:
            known = ", ".join(sorted(split for split in found if split))
            raise DataError(
                f"{self.path}: {found[None][0]} and {len(found[None]) - 1} more lie beside tars of {known}; "
                "say which split they are of by a folder of its name, or prepare each folder alone with source.split"
            )
        if self.split is not None and self.split not in found:
            raise DataError(f"source.split={self.split}: {self.path} has tars of {', '.join(sorted(map(str, found)))}")
        return {str(split): found[split] for split in ([self.split] if self.split else found)}

    def read(self, split: str, unit: str) -> Iterator[Sample | Dropped | Count]:
        """Samples of one tar, in its order."""
        shard = unit.removesuffix(".tar")
        file = below(self.path, unit)
        return each(((f"{shard}/{group.key}", group) for group in tars.groups(file)), self._sample)

    def _sample(self, name: str, group: tars.Group) -> Iterator[Sample | Count]:
        if group.leftovers:
            yield Count("archive members not used", "._*, of macOS", group.leftovers)
        if group.defect:
            raise group.defect
        member, _, field = self.text.partition(":")
        if self._is_other(group, member):
            yield Count("archive members not used", PurePosixPath(group.key).name)
            return
        image = self._image(group)
        value = group.text(member)
        value = _field(value, member, field) if field else value.strip()
        dialogues, tokens = from_text_or_turns(value, images=1)
        if tokens:
            yield Count("image tokens taken out", self.label, tokens)
        for unused in group.members.keys() - {image, member}:
            yield Count("archive members not used", unused)
        yield Sample(name, [group.members[image]], dialogues, self.label)

    def _is_other(self, group: tars.Group, member: str) -> bool:
        """Whether a group tells about the data set (README, LICENSE) and is no sample of it."""
        has_image = any(name in group.members for name in (*IMAGES, self.image))
        known = PurePosixPath(group.key).name.lower().startswith(OTHERS)
        return not has_image and (known or member not in group.members)

    def _image(self, group: tars.Group) -> str:
        found = [self.image] if self.image else [name for name in group.members if name in IMAGES]
        if len(found) > 1:
            raise Defect("several images", f"{', '.join(found)}; choose one with source.image")
        if not found or found[0] not in group.members:
            raise Defect("image missing", f"members are {', '.join(group.members)}")
        return found[0]


def split_of(name: str) -> str | None:
    """The split that a path says by one of its folders or by its file's name (`set-train-0001.tar`); else none."""
    path = PurePosixPath(name)
    for folder in path.parts[:-1]:
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS]
    return SPLITS[words[0]] if len(words) == 1 else None


def _field(text: str, member: str, field: str) -> Any:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits, nesting without end
        raise Defect("json malformed", f"member .{member}: {error}") from error
    if not isinstance(record, dict) or field not in record:
        found = f"has {', '.join(map(str, record))}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise Defect("text missing", f"member .{member} has no {field}, it {found}")
    return record[field]
