"""One pass over a split for an evaluation: prompts to answer, or rows for a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.pixels import ImageInput
from data_prep.store.sample import Reference
from data_prep.store.split import Split
from data_prep.text.dialogues import without_tokens
from data_prep.text.encoder import TextEncoder
from model.batch import IGNORE, Batch
from train.data.collate import EncodedSample, Text, collate, encode_sample
from train.data.order import Permutation


@dataclass(frozen=True)
class EvalItem:
    """One dialogue to evaluate: its sample, its number in the sample, the user's last text, the wanted answer, how the
    data set says that it is scored, and the sample whose images are shown (none: empty).
    """

    sample: str
    dialogue: int
    question: str
    answer: str
    reference: Reference | None = None
    shown: str = ""


@dataclass(frozen=True)
class EvalBatch:
    """A batch and, row by row, what it asks and by which encoder; a filler batch (see `EvalLoader`) has no items."""

    batch: Batch
    items: list[EvalItem]
    encoders: list[TextEncoder]


class EvalLoader:
    """One pass over a split, in its order: every dialogue exactly once over all ranks.

    All ranks make the same number of steps (ZeRO-3 needs it); a rank that has run out of dialogues gets *filler*
    batches without items or targets. No question is left out: `data.on_corrupt_shard` is for training.

    Args:
        split: What to evaluate on.
        text: Text encoders.
        image: Pixels or cached features.
        prompts: Rows end before the last answer and are padded on the left, for generation; else they are training
            rows, for a loss.
        rows: At most this many rows per batch, more only if one sample has more.
        limit: A fixed random choice of this many dialogues instead of all.
        images: `own`; `shuffled`: every sample gets the images of another one; `none`.
        seed: Of the choice and of the shuffle.
        rank, world_size: Of the process group.

    Raises:
        DataError: `images` is none of these, there is nothing to shuffle, or a shard that is needed is corrupt.
    """

    def __init__(
        self,
        split: Split,
        text: Text,
        image: ImageInput,
        prompts: bool = True,
        rows: int = 64,
        limit: int | None = None,
        images: str = "own",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images not in ("own", "shuffled", "none"):
            raise DataError(f"images={images}: choose own, shuffled or none")
        self.split, self.text, self.image, self.prompts, self.images = split, text, image, prompts, images
        counts = split.index()["dialogues"].astype(np.int64)
        sample = np.repeat(np.arange(len(split)), counts)
        dialogue = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
        if limit is not None and limit < len(sample):
            kept = np.sort(Permutation(len(sample), seed, 4)(np.arange(limit)))
            sample, dialogue = sample[kept], dialogue[kept]
        self._partner = self._partners(seed) if images == "shuffled" else None
        self._batches: list[list[tuple[int, list[int]]]] = []
        free = 0
        numbers, starts = np.unique(sample, return_index=True)
        shown = numbers if self._partner is None else np.append(numbers, self._partner[numbers])
        try:
            split.check(shown)
        except CorruptShardError as error:
            raise DataError(
                f"{error}. data.on_corrupt_shard=drop is for training: evaluation asks everything"
            ) from error
        parts = np.split(dialogue, starts[1:])  # one, empty, where there is nothing to evaluate
        for number, chosen in zip(numbers, parts, strict=False):
            chosen = chosen.tolist()
            if not self._batches or len(chosen) > free:
                self._batches.append([])
                free = rows
            self._batches[-1].append((int(number), chosen))
            free -= len(chosen)
        self.steps = -(-len(self._batches) // world_size)
        self._rank, self._world_size = rank, world_size
        self.dialogues = len(sample)

    def _partners(self, seed: int) -> np.ndarray:
        """For every sample another one with images: the next in a random cycle over those that have some."""
        having = np.flatnonzero(self.split.index()["images"])
        if len(having) < 2:
            raise DataError(f"{self.split.folder}: images=shuffled needs at least two samples with images")
        cycle = having[Permutation(len(having), seed, 5)(np.arange(len(having)))]
        partner = np.arange(len(self.split))
        partner[cycle] = np.roll(cycle, 1)
        return partner

    def __len__(self) -> int:
        return self.steps

    @property
    def chosen(self) -> list[tuple[int, list[int]]]:
        """What is asked, on all ranks: the position of a sample in its split, and the numbers of its dialogues."""
        return [one for batch in self._batches for one in batch]

    def __iter__(self) -> Iterator[EvalBatch]:
        for step in range(self.steps):
            number = step * self._world_size + self._rank
            filler = number >= len(self._batches)
            yield self._batch(self._batches[0][:1] if filler else self._batches[number], filler)

    def _batch(self, chosen: list[tuple[int, list[int]]], filler: bool) -> EvalBatch:
        encoded, items, encoders = [], [], []
        for position, dialogues in chosen:
            sample = self.split[position]
            other = sample if self._partner is None else self.split[int(self._partner[position])]
            images, shown = other.images, other.id if other.images else ""
            if self.images == "none":
                images, shown = [], ""
            if len(images) != len(sample.images):  # the text places those of its own
                sample.conversations = [without_tokens(dialogue) for dialogue in sample.conversations]
            sample.images = images
            where = f"{self.split.shard_of(position)}: sample {sample.id}"
            if self.prompts:
                encoded_sample = EncodedSample(where, sample.images)
                for dialogue in (sample.conversations[d] for d in dialogues):
                    encoded_sample.rows.append(self.text.encoder(dialogue).prompt(dialogue, len(sample.images)))
            else:
                encoded_sample, dropped = encode_sample(self.text, sample, dialogues, where)
                if dropped:
                    raise DataError(f"{where}: a dialogue is too long to be evaluated; raise data.max_length")
            encoded.append(encoded_sample)
            for d in dialogues:
                encoders.append(self.text.encoder(sample.conversations[d]))
                user = [turn["content"] for turn in sample.conversations[d] if turn["role"] == "user"]
                reference = sample.references[d] if sample.references else None
                items.append(EvalItem(sample.id, d, user[-1], sample.conversations[d][-1]["content"], reference, shown))
        batch = collate(encoded, self.image, self.text.dialogue.pad_id, left=self.prompts)
        if filler:
            batch.labels = torch.full_like(batch.labels, IGNORE)
            items = []
        return EvalBatch(batch, items, encoders)
