"""LLaVA's JSON files: LLaVA-Pretrain (558 K captions) and the LLaVA-1.5 mix (665 K dialogues), with their images.

A record is `{"id", "image": "folder/file.jpg", "conversations": [{"from": "human"|"gpt", "value"}, ...]}`; `image`
is absent from text-only dialogues and may be a list. The layout is that of LLaVA's instructions: the mix has
`coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`, `vg/VG_100K` and `vg/VG_100K_2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.files import file_sha256
from common.settings import setting
from data_prep.sources import each, json_stream
from data_prep.store.errors import Defect
from data_prep.store.images import read_image
from data_prep.store.sample import Count, Dialogue, Dropped, Sample
from data_prep.text.dialogues import exchange, from_turns

TURNS = ("conversations", "messages", "conversation")
"""Keys of a record's turns: LLaVA's, and what ShareGPT, OpenAI and others write."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


@dataclass
class Llava:
    """The source.

    Attributes:
        json: The JSON file.
        images: Folder that the records' image paths begin in.
        captions: Whether every dialogue is a caption: the instruction ("Describe the image concisely.") is left out, as
            LLaVA does in pre-training.
        label: Source of the samples; null: the first folder of the image's path, or `text`.
        split: Name of the split that is made.
        samples_per_shard: Records in a unit of work.
    """

    json: Path = setting(path=True)
    images: Path = setting(path=True)
    captions: bool = False
    label: str | None = None
    split: str = "train"
    samples_per_shard: int = setting(5000, within="[1, 1e7]")

    def made_from(self) -> dict[str, Any]:
        """The JSON file by its checksum. Image files are taken as they are when their shard is made."""
        json_stream.check_exists(self.json)
        return {
            "source": "llava",
            "json_sha256": file_sha256(self.json),
            "captions": self.captions,
            "label": self.label,
            "split": self.split,
            "samples_per_shard": self.samples_per_shard,
        }

    def plan(self) -> dict[str, list[list[int]]]:
        """Units `[number of the first record, first byte, end]`."""
        ends = json_stream.boundaries(self.json, self.samples_per_shard)
        spans = zip(ends, ends[1:], strict=False)
        return {self.split: [[n * self.samples_per_shard, start, stop] for n, (start, stop) in enumerate(spans)]}

    def read(self, split: str, unit: list[int]) -> Iterator[Sample | Dropped | Count]:
        """Samples of a stretch of the file, in its order. Ids are the records' own, which repeat, and their numbers."""
        first, start, stop = unit
        records = enumerate(json_stream.read(self.json, start, stop), first)
        return each(((f"{record.get('id')}@{number}", record) for number, record in records), self._sample)

    def _sample(self, name: str, record: dict[str, Any]) -> Iterator[Sample | Count]:
        for kind in ("video", "videos", "audio", "audios"):
            if record.get(kind):
                raise Defect(f"{kind.removesuffix('s')} is not read", str(record[kind])[:100])
        listed = record.get("image") or record.get("images")
        names = listed if isinstance(listed, list) else [listed] if listed else []
        talk = next((record[name] for name in TURNS if record.get(name) is not None), None)
        if talk is None:
            known = ", ".join(TURNS)
            raise Defect("conversation missing", f"the record has {', '.join(map(str, record))}; known are {known}")
        dialogue, tokens = from_turns(talk, len(names))
        files = [find_image(self.images, each) for each in names]
        images = [read_image(file) for file in files]
        label = self.label or (PurePosixPath(names[0]).parts[0] if names else "text")
        if tokens:
            yield Count("image tokens taken out", label, tokens)
        for wanted, file in zip(names, files, strict=True):
            if file.suffix != PurePosixPath(wanted).suffix:
                yield Count("image found under another suffix", f"{label}: {file.suffix}")
        if self.captions:
            dialogue = _caption(dialogue)
        elif dialogue and dialogue[0]["role"] == "assistant":
            # Cut-up ShareGPT dialogues begin so; LLaVA leaves that turn out as well.
            dialogue = dialogue[1:]
            yield Count("answer without a question at the beginning left out", label)
        yield Sample(name, images, [dialogue], label)


def _caption(dialogue: Dialogue) -> Dialogue:
    roles = [turn["role"] for turn in dialogue]
    if roles != ["user", "assistant"]:
        raise Defect("caption is no single exchange", " ".join(map(str, roles)))
    return exchange("", dialogue[1]["content"])


def find_image(folder: Path, name: Any) -> Path:
    """The file of an image path in a record.

    OCR-VQA's images were saved under the suffix of their URL while the mix says `.jpg` throughout, so a file of the
    same name with another suffix is the image.

    Raises:
        Defect: not a path, one that leaves `folder`, or no such file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Defect("image path is no file name", repr(name))
    relative = PurePosixPath(name)
    if relative.is_absolute() and relative.is_relative_to(folder.absolute()):
        relative = relative.relative_to(folder.absolute())
    if relative.is_absolute() or ".." in relative.parts:
        raise Defect("image path leaves its folder", name)
    file = folder / relative
    try:
        for candidate in (file, *map(file.with_suffix, SUFFIXES)):
            if candidate.is_file():
                return candidate
    except (OSError, ValueError) as error:  # e.g. a name that is too long, or "."
        raise Defect("image path is no file name", f"{name}: {error}") from error
    raise Defect("image missing", str(file))
