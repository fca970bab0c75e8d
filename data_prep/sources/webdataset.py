"""Any WebDataset of images with text: tars whose members `KEY.jpg`, `KEY.txt` or `KEY.json` make a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources import each, tars
from data_prep.store.errors import Defect
from data_prep.store.sample import Count, Dropped, Sample
from data_prep.text.dialogues import from_text_or_turns

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass
class WebDataset:
    """The source; one tar is one unit of work.

    Attributes:
        path: Folder of the tars, searched through all its folders.
        image: Suffix of the image's member; null: the one that is an image's.
        text: Suffix of the text's member, or `json:KEY` for a value in the member `KEY.json`: a caption, or a list
            of turns `{"from", "value"}` or `{"role", "content"}`.
        label: Source of the samples.
    """

    path: Path
    image: str | None = None
    text: str = "txt"
    label: str = "webdataset"

    def made_from(self) -> dict[str, Any]:
        """Names and sizes of the tars, and the settings."""
        settings = {"image": self.image, "text": self.text, "label": self.label}
        return {"source": "webdataset", "tars": tars.listing(self.path, tars.find(self.path)), **settings}

    def plan(self) -> dict[str, list[str]]:
        """Units are names of tars."""
        return {"train": [str(file.relative_to(self.path)) for file in tars.find(self.path)]}

    def read(self, split: str, unit: str) -> Iterator[Sample | Dropped | Count]:
        """Samples of one tar, in its order."""
        shard = unit.removesuffix(".tar")
        return each(((f"{shard}/{group.key}", group) for group in tars.groups(self.path / unit)), self._sample)

    def _sample(self, name: str, group: tars.Group) -> Iterator[Sample | Count]:
        if group.defect:
            raise group.defect
        image = self._image(group)
        member, _, field = self.text.partition(":")
        value = group.text(member)
        if field:
            try:
                record = json.loads(value)
            except json.JSONDecodeError as error:
                raise Defect("json malformed", f"member .{member}: {error}") from error
            if not isinstance(record, dict) or field not in record:
                raise Defect("text missing", f"member .{member} has no {field}")
            value = record[field]
        dialogue, tokens = from_text_or_turns(value, images=1)
        if tokens:
            yield Count("image tokens taken out", self.label, tokens)
        for unused in group.members.keys() - {image, member}:
            yield Count("archive members not used", unused)
        yield Sample(name, [group.members[image]], [dialogue], self.label)

    def _image(self, group: tars.Group) -> str:
        found = [self.image] if self.image else [name for name in group.members if name in IMAGES]
        if len(found) > 1:
            raise Defect("several images", f"{', '.join(found)}; choose one with source.image")
        if not found or found[0] not in group.members:
            raise Defect("image missing", f"members are {', '.join(group.members)}")
        return found[0]
