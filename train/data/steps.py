"""The micro-batches of an optimizer step: a function of its number alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.pixels import ImageInput
from data_prep.store.sample import Sample
from data_prep.store.split import Split
from model.batch import Batch
from train.data.batching import Batching, deal_by_tokens
from train.data.collate import EncodedSample, Text, collate, encode_sample
from train.data.config import DataConfig
from train.data.order import Draws, draw_dialogues


@dataclass(frozen=True)
class Step:
    """What a worker returns: the micro-batches of a step, or the error that ends the run."""

    batches: list[Batch]
    dropped: int = 0
    corrupt: tuple[CorruptShardError, ...] = ()
    error: str | None = None


class Sizes:
    """Images and estimated length of drawn samples, from the splits' indices: `batching.Sizes`."""

    def __init__(self, splits: list[Split], dialogues: int | None) -> None:
        self.splits, self.dialogues = splits, dialogues

    def __call__(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Images and estimated tokens, int64, of each draw."""
        images = np.zeros(len(draws.sample), np.int64)
        characters = np.zeros(len(draws.sample), np.int64)
        for source in np.unique(draws.source):
            here = draws.source == source
            records = self.splits[source].index()[draws.sample[here]]
            drawn = records["dialogues"].astype(np.int64)
            if self.dialogues is not None:
                drawn = np.minimum(drawn, self.dialogues)
            images[here] = records["images"]
            characters[here] = records["characters"] * drawn // np.maximum(records["dialogues"], 1)
        return images, characters


@dataclass(frozen=True)
class Steps(Dataset):
    """Step number -> this rank's micro-batches. Pure, so any process may load any step.

    Attributes:
        place: Rank, world size, micro-batches per step and rank.
        image_tokens: Visual tokens that an image adds to each row of its sample, for `data.tokens_per_micro_batch`.
    """

    splits: list[Split]
    batching: Batching
    text: Text
    image: ImageInput
    config: DataConfig
    seed: int
    place: tuple[int, int, int]
    image_tokens: int

    def __getitem__(self, step: int) -> Step:
        multiple, pad_id = self.config.pad_to_multiple, self.text.dialogue.pad_id
        batches, dropped, corrupt = [], 0, {}
        try:
            for draws in self.deal(step):
                encoded = []
                for source, sample, epoch in draws:
                    try:
                        encoded_sample, cut = self._encode(self.splits[source][sample], source, sample, epoch)
                    except CorruptShardError as error:
                        if self.config.on_corrupt_shard == "fail":
                            raise
                        corrupt[error.file] = error
                        continue
                    encoded.append(encoded_sample)
                    dropped += cut
                batches.append(collate(encoded, self.image, pad_id, multiple=multiple))
        except DataError as error:
            # As a value: raised in a worker process it would arrive wrapped in that process's traceback.
            return Step([], error=str(error))
        return Step(batches, dropped, tuple(corrupt.values()))

    def deal(self, step: int) -> list[Draws]:
        """The draws of this rank's micro-batches."""
        draws = self.batching.step(step)
        budget = self.config.tokens_per_micro_batch
        if budget is None:
            return self.batching.deal(draws, *self.place)
        images, _ = self.batching.sizes(draws)
        tokens = np.array([self._tokens(*draw, seen) for draw, seen in zip(draws, images.tolist(), strict=True)])
        rank, world_size, _ = self.place
        return [draws.take(ranks[rank]) for ranks in deal_by_tokens(tokens, images, world_size, budget)]

    def _tokens(self, source: int, sample: int, epoch: int, images: int) -> int:
        """Of a sample that may be another rank's, so its images are not read; 0 where its shard is left out."""
        try:
            encoded_sample, _ = self._encode(self.splits[source].text(sample), source, sample, epoch)
        except CorruptShardError:
            if self.config.on_corrupt_shard == "fail":
                raise
            return 0
        return sum(len(row.input_ids) + images * self.image_tokens for row in encoded_sample.rows)

    def _encode(self, content: Sample, source: int, sample: int, epoch: int) -> tuple[EncodedSample, int]:
        split = self.splits[source]
        wanted = self.config.dialogues_per_sample
        chosen = draw_dialogues(len(content.conversations), wanted, self.seed, source, sample, epoch)
        return encode_sample(self.text, content, chosen, f"{split.shard_of(sample)}: sample {content.id}")
