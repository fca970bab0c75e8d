"""Samples to `model.batch.Batch`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from data_prep.store.errors import DataError
from data_prep.store.pixels import ImageInput
from data_prep.store.sample import Dialogue, Sample
from data_prep.text.encoder import Encoded, TextEncoder, TooLongError
from model.batch import IGNORE, Batch


@dataclass
class Text:
    """How dialogues become rows.

    Attributes:
        dialogue: Encoder of dialogues.
        caption: Encoder of captions (dialogues with an empty user turn); default the same.
        on_too_long: `fail`, or `drop` the dialogue, which is then counted.
    """

    dialogue: TextEncoder
    caption: TextEncoder | None = None
    on_too_long: str = "fail"

    def encoder(self, dialogue: Dialogue) -> TextEncoder:
        """The encoder that a dialogue goes to."""
        said = any(turn["role"] == "user" and turn["content"] for turn in dialogue)
        return self.dialogue if said or self.caption is None else self.caption


@dataclass
class EncodedSample:
    """One sample of a micro-batch: where it lies (for messages), its images and its encoded rows."""

    where: str
    images: list[bytes]
    rows: list[Encoded] = field(default_factory=list)


def encode_sample(text: Text, sample: Sample, chosen: list[int], where: str) -> tuple[EncodedSample, int]:
    """The chosen dialogues of a sample as rows, and how many were dropped as too long.

    Raises:
        DataError: naming shard and sample: a dialogue is too long under `on_too_long=fail`, or has no target.
    """
    encoded, dropped = EncodedSample(where, sample.images), 0
    for number in chosen:
        dialogue = sample.conversations[number]
        try:
            encoded.rows.append(text.encoder(dialogue).encode(dialogue, len(sample.images)))
        except TooLongError as error:
            if text.on_too_long == "fail":
                raise DataError(
                    f"{where}, dialogue {number}: {error}; raise data.max_length or set data.on_too_long=drop"
                ) from error
            dropped += 1
        except DataError as error:
            raise DataError(f"{where}, dialogue {number}: {error}") from error
    return encoded, dropped


def collate(
    samples: list[EncodedSample], image: ImageInput, pad_id: int, left: bool = False, multiple: int = 1
) -> Batch:
    """One micro-batch.

    Args:
        samples: Its samples, in order; possibly none.
        image: What image files become.
        pad_id: Token id of padding (masked by length, so it may be a real token's).
        left: Pad on the left (generation) instead of the right.
        multiple: Pad the length to a multiple of this.

    Raises:
        DataError: naming shard and sample of an unreadable image.
    """
    rows = [row for encoded in samples for row in encoded.rows]
    # Everything dropped: one padding row without targets, so that this rank still takes its part in the step.
    rows = rows or [Encoded([pad_id], [IGNORE])]
    length = -(-max(len(row.input_ids) for row in rows) // multiple) * multiple
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    slots = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        span = slice(length - size, length) if left else slice(0, size)
        input_ids[number, span] = torch.tensor(row.input_ids, dtype=torch.int64)
        labels[number, span] = torch.tensor(row.labels, dtype=torch.int64)
        mask[number, span] = 1
        start = length - size if left else 0
        for place in row.slots:
            slots[number, start + place] = True
            mask[number, start + place] = 0
    row_to_sample = [number for number, encoded in enumerate(samples) for _ in encoded.rows] or [0]
    views, image_to_sample = [], []
    counts: list[list[int]] = []  # views of each image of each sample
    for number, encoded in enumerate(samples):
        counts.append([])
        for data in encoded.images:
            try:
                found = image.read(data)
            except Exception as error:  # whatever a decoder raises, the sample is named
                raise DataError(f"{encoded.where}: {error or type(error).__name__}") from error
            views += found
            counts[number].append(len(found))
            image_to_sample += [number] * len(found)
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        row_to_sample=torch.tensor(row_to_sample, dtype=torch.int64),
        images=image.batch(views) if views else image.dummy(),
        image_to_sample=torch.tensor(image_to_sample or [0], dtype=torch.int64),
        image_weight=torch.full((max(1, len(image_to_sample)),), float(bool(views))),
        n_samples=max(1, len(samples)),
        slots=slots if any(row.slots for row in rows) else None,
        image_at=_image_at(rows, [counts[s] if counts else [] for s in row_to_sample], length if left else None),
    )


def _image_at(rows: list[Encoded], counts: list[list[int]], width: int | None) -> torch.Tensor:
    """`Batch.image_at`: every view of an image stands at its place; `width` is that of left-padded rows."""
    places = []
    for row, views in zip(rows, counts, strict=True):
        padding = 0 if width is None else width - len(row.input_ids)
        at = row.image_at or (0,) * len(views)
        places.append([padding + place for place, count in zip(at, views, strict=True) for _ in range(count)])
    most = max(1, *map(len, places)) if places else 1
    return torch.tensor([found + [-1] * (most - len(found)) for found in places], dtype=torch.int64)
