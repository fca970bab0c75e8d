"""Writes checkpoints that no crash can leave half written, in the background where asked.

A checkpoint is written under a temporary name, each rank its own files, synced and summed. When all ranks are done,
rank 0 marks it `COMPLETE` with size and checksum of every file, renames it and removes what it makes superfluous.
(DeepSpeed's own `latest` is written before the other ranks are done.)

With `checkpoint.background` training goes on meanwhile: what is written is a copy in host memory, made at the step that
the checkpoint names. A thread writes it; the ranks agree at step boundaries that all are done, so that no collective
runs beside training's. DeepSpeed's decoupled writer does not serve: it hands the live tensors to another process and
waits for it before the next optimizer step. torch's asynchronous writer has a format that DeepSpeed cannot load.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

from common.files import seal, sync, write_atomically, write_json
from train.engine import checkpoint
from train.engine.checkpoint import COMPLETE, CheckpointError, Progress
from train.engine.engine import Engine
from train.process import distributed, watchdog
from train.process.run_files import RunDir


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        engine: What is saved.
        run_dir: Of the run.
        identity: What the checkpoints belong to (data, LLM, vision encoder, ...); compared on resume.
        keep: Complete checkpoints to keep, the newest included; the best is kept besides.
        background: Training goes on while one is written.
    """

    def __init__(self, engine: Engine, run_dir: Path, identity: dict[str, str], keep: int, background: bool) -> None:
        self.engine, self.identity, self.keep, self.background = engine, identity, keep, background
        self.root = RunDir(run_dir).checkpoints
        self._name = ""
        self._record: dict[str, Any] | None = None  # of the one whose files are being written; then rank 0 publishes it
        self._work: Future[dict[str, Any]] | None = None

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of this step; in the background, begin to: `poll` and `finish` end it. Collective.

        Raises:
            CheckpointError: this one or the one begun before cannot be written; the earlier ones stay.
        """
        self.finish()
        name = checkpoint.name(progress.step)
        # Resumed there, and no step since: `find` has taken a damaged one away.
        if distributed.gather((self.root / name / COMPLETE).exists())[0]:
            return
        temporary = self.root / f".{name}.writing"
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            self.root.mkdir(parents=True, exist_ok=True)
        _check_room(self.engine, self.root)
        distributed.barrier()
        self._name = name
        self._record = {
            "progress": copy.deepcopy(asdict(progress)),
            "world_size": distributed.world_size(),
            "identity": self.identity,
        }
        contents = self._collect(temporary.name)
        write = partial(_write, temporary, contents, self.engine.deepspeed.checkpoint_engine)
        self._work = _start(write, self.background)
        if not self.background:
            self.finish()

    def poll(self) -> None:
        """Take a checkpoint that is being written as far as it has come; after every step. Collective.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._work is not None and distributed.reduce([float(self._work.done())], self.engine.device, "min")[0]:
            self._advance()

    def finish(self) -> None:
        """Wait until what was begun is complete. Collective.

        Raises:
            CheckpointError: it cannot be written.
        """
        while self._work is not None:
            wait([self._work])
            self._advance()

    def _collect(self, tag: str) -> dict[Path, Any]:
        """What this rank has to write, by file: copies in host memory, or (not in the background) the state itself."""
        deepspeed, collector = self.engine.deepspeed, _Collector(self.background)
        writer, deepspeed.checkpoint_engine = deepspeed.checkpoint_engine, collector
        try:
            # Frozen weights come from the base models, whose identity is checked instead.
            deepspeed.save_checkpoint(
                str(self.root),
                tag=tag,
                client_state={"rng": {"torch": torch.get_rng_state(), "python": random.getstate()}},
                exclude_frozen_parameters=self.engine.zero_stage == 3,
                save_latest=False,
            )
        finally:
            deepspeed.checkpoint_engine = writer
        return collector.contents

    def _advance(self) -> None:
        """From written to published, from published to done, once all ranks are that far. Collective."""
        assert self._work is not None
        work, self._work = self._work, None
        error = work.exception()
        if error is not None and not isinstance(error, (OSError, RuntimeError)):
            raise error
        # All ranks must agree that every shard is there before the name changes.
        if distributed.reduce([float(error is not None)], self.engine.device, "max")[0]:
            detail = " on another rank" if error is None else f": {error}"
            path = self.root / self._name
            raise CheckpointError(f"{path} could not be written{detail}; the earlier checkpoints are untouched")
        if self._record is None:
            return
        record, self._record = self._record | {"files": {}}, None
        for part in distributed.gather(work.result()):
            record["files"] |= part
        publish = partial(_publish, self.root, self._name, record, self.keep) if distributed.rank() == 0 else dict
        self._work = _start(publish, self.background)


class _Collector(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's writer and keeps what it would write."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        self.contents: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.contents[Path(path)] = host_copy(state_dict) if self.copies else state_dict


def host_copy(value: Any) -> Any:
    """A deep copy whose tensors lie in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, host_copy(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(item) for item in value)
    return copy.deepcopy(value)


def _start(work: Callable[[], dict[str, Any]], background: bool) -> Future[dict[str, Any]]:
    """Run `work` now, or in a thread that does not keep a process alive which fails meanwhile."""
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if background:
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
    else:
        run()
    return future


def _write(folder: Path, contents: dict[Path, Any], writer: TorchCheckpointEngine) -> dict[str, Any]:
    """Write the files of this rank, and what `seal` says of them. Empties `contents` on its way."""
    names = [str(path.relative_to(folder)) for path in contents]
    while contents:
        path, content = contents.popitem()
        writer.save(content, str(path))
        watchdog.beat()
    sealed = seal(folder, names)
    watchdog.beat()
    return sealed


def _publish(root: Path, name: str, record: dict[str, Any], keep: int) -> dict[str, Any]:
    """Give the folder that all ranks have written its name; rank 0 alone."""
    temporary = root / f".{name}.writing"
    write_json(temporary / COMPLETE, record)
    shutil.rmtree(root / name, ignore_errors=True)  # half deleted; a complete one was never written again
    os.replace(temporary, root / name)
    sync(root)
    write_atomically(root / "latest", name + "\n")
    _prune(root, keep, checkpoint.name(record["progress"]["best_step"]))
    return {}


def _prune(root: Path, keep: int, best: str) -> None:
    """Remove what the newest checkpoint makes superfluous: older ones, damaged and half-written ones, conversions."""
    complete = [path for path in checkpoint.by_step(root) if (path / COMPLETE).is_file()]
    kept = complete[-keep:] + [path for path in complete[:-keep] if path.name == best]
    for path in complete:
        if path not in kept:
            (path / COMPLETE).unlink()  # goes first: a checkpoint half deleted must not look whole
    (root / "latest_universal").unlink(missing_ok=True)
    for pattern in ("step-*", "universal-step-*", "damaged-step-*", ".*.writing"):
        for path in root.glob(pattern):
            if path not in kept:
                shutil.rmtree(path)


def _check_room(engine: Engine, root: Path) -> None:
    """Refuse to start writing what does not fit: fp32 weights and two moments of every trained parameter."""
    if distributed.rank() == 0:
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters() if p.requires_grad)
        need, free = 12 * trained + 2**20, shutil.disk_usage(root).free
        short = float(free < need)
    else:
        short = 0.0
    if distributed.reduce([short], engine.device, "max")[0]:
        detail = f": {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free" if distributed.rank() == 0 else ""
        raise CheckpointError(
            f"no room on disk for a checkpoint in {root}{detail}; free some or lower checkpoint.keep. "
            "The earlier checkpoints are untouched"
        )
