"""The training loader: endless steps, in loader processes or in the rank itself."""

from __future__ import annotations

import multiprocessing.queues
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from common import settings
from common.files import digest
from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.pixels import ImageInput
from model.batch import Batch
from train.data.batching import Batching
from train.data.config import DataConfig
from train.data.order import MixtureOrder
from train.data.splits import make_text, open_train_split
from train.data.steps import Sizes, Step, Steps
from train.process.signals import SIGNALS

GPU_WORKERS = 4
"""Loader processes of a rank with a GPU, if nothing else is said (docs/loader.md, "Workers, memory, faults")."""


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
    in `TrainLoader.__next__`. Once told, a further death interrupts nothing: the process is on its way out.

    Raises:
        DataError: a loader process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise DataError(
            f"{error}; if memory ran out, lower data.num_workers or data.prefetch. The run resumes from its newest "
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
        corrupt: Shards left out as unreadable that this rank met, in the order in which it did.

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
        sizes = Sizes(self.splits, config.dialogues_per_sample)
        self.batching = Batching(self.order, config.batch_size, config.group_by, config.group_window, sizes, seed)
        text = make_text(config, tokenizer)
        place = rank, world_size, accumulation
        self._steps = Steps(self.splits, self.batching, text, image, config, seed, place, image_tokens)
        self._next = 0
        self._iterator: Iterator[Step] | None = None
        self.dropped = 0
        self.corrupt: dict[Path, CorruptShardError] = {}

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
            try:
                step = next(self._iterator)
            except (ConnectionError, EOFError) as error:
                if not self.workers:
                    raise
                # It died while it handed over a batch: the broken connection comes before torch's signal.
                raise RuntimeError(f"DataLoader worker is gone: {str(error) or type(error).__name__}") from error
        if step.error is not None:
            raise DataError(step.error)
        self.dropped += step.dropped
        self.corrupt |= {problem.file: problem for problem in step.corrupt if problem.file not in self.corrupt}
        self._next += 1
        return step.batches

    def _start(self) -> Iterator[Step]:
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
