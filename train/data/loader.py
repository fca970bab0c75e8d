"""Training and evaluation loaders over prepared splits."""

from __future__ import annotations

import logging
import multiprocessing.queues
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from common import settings
from common.files import digest
from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.manifest import MANIFEST
from data_prep.store.pixels import ImageInput
from data_prep.store.sample import Reference, Sample
from data_prep.store.split import Split
from data_prep.text.encoder import TextEncoder
from model.batch import IGNORE, Batch
from train.data.batching import Batching, deal_by_tokens
from train.data.collate import EncodedSample, Text, collate, encode_sample
from train.data.config import DataConfig
from train.data.order import Draws, MixtureOrder, Permutation, draw_dialogues
from train.process.signals import SIGNALS

log = logging.getLogger(__name__)

GPU_WORKERS = 4
"""Loader processes of a rank with a GPU, if nothing else is said (docs/loader.md, "Workers, memory, faults")."""


def open_split(config: DataConfig, path: str, whole: bool = True) -> Split:
    """A split named in the configuration; `whole` as in `Split`.

    Raises:
        DataError: it is not prepared or not whole.
    """
    return Split(Path(config.root) / path, whole)


def is_prepared(config: DataConfig, path: str) -> bool:
    """Whether a split named in the configuration is on this machine."""
    return (Path(config.root) / path / MANIFEST).is_file()


def open_train_split(config: DataConfig, path: str) -> Split:
    """A split to train on: whole, unless `data.on_corrupt_shard` says that it may lose shards.

    Raises:
        DataError: it is not prepared or not whole.
    """
    return open_split(config, path, config.on_corrupt_shard == "fail")


def make_text(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Text encoders of the configuration.

    Raises:
        DataError: a template that does not go with the tokenizer.
    """
    caption = config.caption_template
    return Text(
        TextEncoder(tokenizer, config.template, config.max_length, config.compat == "official"),
        TextEncoder(tokenizer, caption, config.max_length, config.compat == "official") if caption else None,
        config.on_too_long,
    )


@dataclass(frozen=True)
class _Step:
    """What a worker returns: the micro-batches of a step, or the error that ends the run."""

    batches: list[Batch]
    dropped: int = 0
    corrupt: tuple[CorruptShardError, ...] = ()
    error: str | None = None


class _Sizes:
    """Images and estimated length of drawn samples, from the splits' indices: `batching.Sizes`."""

    def __init__(self, splits: list[Split], dialogues: int | None) -> None:
        self.splits, self.dialogues = splits, dialogues

    def __call__(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
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


class _Steps(Dataset):
    """Step number -> this rank's micro-batches. Pure, so any process may load any step."""

    def __init__(
        self,
        splits: list[Split],
        batching: Batching,
        text: Text,
        image: ImageInput,
        config: DataConfig,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int,
        image_tokens: int,
    ) -> None:
        self.splits, self.batching, self.text, self.image = splits, batching, text, image
        self.config, self.seed, self.image_tokens = config, seed, image_tokens
        self.place = rank, world_size, accumulation

    def __getitem__(self, step: int) -> _Step:
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
            return _Step([], error=str(error))
        return _Step(batches, dropped, tuple(corrupt.values()))

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


class _From(Sampler):
    """Step numbers from one on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1


@contextmanager
def loader_errors() -> Iterator[None]:
    """Name the cause when a loader process dies; also a decorator.

    torch raises from a signal handler, wherever the main thread is at that moment: in the middle of a step as well as
    in `TrainLoader.__next__`.

    Raises:
        DataError: a loader process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"{error}; if memory ran out, lower data.num_workers or data.prefetch. The run goes on from its newest "
            "checkpoint when it is started again"
        ) from error


def _end_when_stuck(worker: int) -> None:
    """In a loader process: a batch that cannot be handed over ends the process, and with it the run. Python's queue
    would print the error and go on, and the rank would wait for that batch for ever.
    """

    def end(error: Exception, batch: object) -> None:
        print(f"error: loader process {worker} could not hand over a batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


class TrainLoader:
    """Endless iterator over optimizer steps: `next(loader)` is the list of this rank's micro-batches.

    The samples of step s are a function of s alone (`Batching`): not of the number of ranks, which share it, nor of the
    worker processes, which take one step each. So the state is the number of the next step.

    Args:
        config: Data configuration.
        tokenizer: Of the LLM.
        image: Pixels or cached features.
        seed: Of the run.
        rank, world_size: Of the process group.
        accumulation: Micro-batches per step and rank; with `data.tokens_per_micro_batch` each step has as many as its
            tokens need, the same number on all ranks.
        image_tokens: Visual tokens that an image of a sample adds to each of its rows, at most; they count there.

    Attributes:
        dropped: Dialogues left out as too long since this process started.
        corrupt: Shards left out as unreadable that this process met.

    Raises:
        ConfigError: no sources, or an option with a value that it does not take.
        DataError: a split that is not prepared, or sizes that do not divide.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        image: ImageInput,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        image_tokens: int = 0,
    ) -> None:
        settings.check(config, "data.")
        if config.batch_size % (world_size * accumulation):
            raise DataError(
                f"data.batch_size={config.batch_size} does not divide among {world_size} ranks "
                f"with {accumulation} micro-batches each"
            )
        self.config = config
        self.splits = [open_train_split(config, source.path) for source in config.train]
        try:
            self.order = MixtureOrder(
                [len(split) for split in self.splits], [source.weight for source in config.train], seed
            )
        except ValueError as error:
            raise DataError(f"data.train: {error}") from error
        sizes = _Sizes(self.splits, config.dialogues_per_sample)
        self.batching = Batching(self.order, config.batch_size, config.group_by, config.group_window, sizes, seed)
        text = make_text(config, tokenizer)
        self._steps = _Steps(
            self.splits, self.batching, text, image, config, seed, rank, world_size, accumulation, image_tokens
        )
        self._next = 0
        self._iterator: Iterator[_Step] | None = None
        self.dropped = 0
        self.corrupt: set[Path] = set()

    @property
    def epoch_size(self) -> int:
        """Samples of one epoch of the mixture."""
        return self.order.epoch_size

    @property
    def fingerprint(self) -> str:
        """Of everything the order of samples depends on but the seed; belongs into checkpoints."""
        weights = [source.weight for source in self.config.train]
        fixed: list[int | str | None] = [self.config.batch_size, self.config.dialogues_per_sample]
        if self.config.group_by != "none":
            fixed += [self.config.group_by, self.config.group_window]
        return digest([[split.fingerprint for split in self.splits], weights, fixed])

    def images(self, source: int, sample: int) -> list[bytes]:
        """Image files of a sample; none where its shard is corrupt and left out.

        Raises:
            DataError: its shard is corrupt.
        """
        try:
            return self.splits[source][sample].images
        except CorruptShardError:
            if self.config.on_corrupt_shard == "fail":
                raise
            return []

    def samples(self, step: int) -> list[list[str]]:
        """Shard and id of every sample of this rank's micro-batches of a step."""
        return [
            [f"{self.splits[s].shard_of(n)}: sample {self.splits[s].text(n).id}" for s, n, _ in draws]
            for draws in self._steps.deal(step)
        ]

    def check_shared_memory(self, local_ranks: int, folder: str = "/dev/shm") -> None:
        """Refuse loader processes that the machine's shared memory cannot hold. They would wait in it for ever.

        Makes one step, to know its size; nothing with `data.num_workers=0`.

        Args:
            local_ranks: Of this machine; all have the same folder.
            folder: Where torch's shared memory is.

        Raises:
            DataError: too small, with the size needed; or what is wrong with the step.
        """
        workers, ahead = self.workers, self.config.prefetch
        if not workers or not Path(folder).is_dir():
            return
        step = self._steps[self._next]
        if step.error is not None:
            raise DataError(step.error)
        tensors = (t for batch in step.batches for t in vars(batch).values() if isinstance(t, torch.Tensor))
        batch = sum(t.numel() * t.element_size() for t in tensors)
        need, free = local_ranks * batch * (workers * ahead + 1), shutil.disk_usage(folder).free
        if need > free:
            raise DataError(
                f"{folder} has {free / 2**20:.0f} MiB free, loader processes need {need / 2**20:.0f} MiB: steps of "
                f"{batch / 2**20:.1f} MiB, data.num_workers={workers} x data.prefetch={ahead} steps "
                f"+ 1 for each of {local_ranks} ranks. Make it larger (docker run --shm-size=..., or mount -o "
                "remount,size=...), lower those two, or load in the ranks themselves with data.num_workers=0"
            )

    @property
    def workers(self) -> int:
        """Loader processes of this rank."""
        if self.config.num_workers is None:
            return GPU_WORKERS if torch.cuda.is_available() else 0
        return self.config.num_workers

    def state(self) -> dict[str, int]:
        """Where to go on: the next step, and its epoch and position for the reader of a checkpoint."""
        epoch, position = divmod(self._next * self.config.batch_size, self.epoch_size)
        return {"step": self._next, "epoch": epoch, "position": position}

    def load(self, state: dict[str, int]) -> None:
        """Go on from `state()` of a loader with the same fingerprint and seed, on any number of ranks."""
        self._next = state["step"]
        self._iterator = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> list[Batch]:
        """Micro-batches of the next step.

        Raises:
            DataError: an unreadable image, a corrupt shard or a dialogue that is too long or has no target; names shard
                and sample. Or a loader process was killed.
        """
        if self._iterator is None:
            self._iterator = self._start()
        with loader_errors():
            step = next(self._iterator)
        if step.error is not None:
            raise DataError(step.error)
        self.dropped += step.dropped
        for problem in step.corrupt:
            if problem.file not in self.corrupt:
                log.warning("%s; its %d samples are left out of the run", problem, problem.samples)
                self.corrupt.add(problem.file)
        self._next += 1
        return step.batches

    def _start(self) -> Iterator[_Step]:
        workers = self.workers
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=_From(self._next),
            num_workers=workers,
            prefetch_factor=self.config.prefetch if workers else None,
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=bool(workers),
            worker_init_fn=_end_when_stuck if workers else None,
        )
        # A cluster sends its stop signals to every process, and the rank still needs batches to end its step: workers
        # inherit a mask that blocks them, from their first instruction on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            resource_tracker.ensure_running()  # unblocks some of them when it starts
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class EvalItem:
    """One dialogue to evaluate: its sample, its number in the sample, the user's last text, the wanted answer, and how
    the data set says that it is scored.
    """

    sample: str
    dialogue: int
    question: str
    answer: str
    reference: Reference | None = None


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

    def __iter__(self) -> Iterator[EvalBatch]:
        for step in range(self.steps):
            number = step * self._world_size + self._rank
            filler = number >= len(self._batches)
            yield self._batch(self._batches[0][:1] if filler else self._batches[number], filler)

    def _batch(self, chosen: list[tuple[int, list[int]]], filler: bool) -> EvalBatch:
        encoded, items, encoders = [], [], []
        for position, dialogues in chosen:
            sample = self.split[position]
            if self._partner is not None:
                sample.images = self.split[int(self._partner[position])].images
            elif self.images == "none":
                sample.images = []
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
                items.append(EvalItem(sample.id, d, user[-1], sample.conversations[d][-1]["content"], reference))
        batch = collate(encoded, self.image, self.text.dialogue.pad_id, left=self.prompts)
        if filler:
            batch.labels = torch.full_like(batch.labels, IGNORE)
            items = []
        return EvalBatch(batch, items, encoders)
