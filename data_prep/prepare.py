"""From a source to prepared splits: shards written by any number of processes and tasks, merged into manifests.

Every shard ("unit") is read, checked and written alone, and is finished when its receipt is there. A task that was
killed therefore redoes only its own unfinished shard, and a second run over finished data does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from common.errors import ConfigError
from common.files import digest, remove_temporaries, write_atomically
from common.settings import check, setting
from data_prep.existing import complete, damaged, refuse_others
from data_prep.store.errors import DataError
from data_prep.store.images import MAX_PIXELS, shrink
from data_prep.store.manifest import (
    Manifest,
    Shard,
    build_manifest,
    read_receipt,
    write_manifest,
)
from data_prep.store.sample import SCHEMA_VERSION, Count, Dialogue, Dropped, Sample
from data_prep.store.writer import ShardWriter
from data_prep.text.templates import NAMES
from data_prep.verify import TokenCounter, Verifier

PLAN = "plan.json"


class Source(Protocol):
    """A data set that can be read in independent units. Instances are small and travel to worker processes."""

    def made_from(self) -> dict[str, Any]:
        """What the samples depend on, as JSON; a change makes the data anew. Every task asks, so it must be quick."""

    def plan(self) -> dict[str, list[Any]]:
        """The units of each split, every one a small JSON value for `read`. Asked once; the result is kept."""

    def read(self, split: str, unit: Any) -> Iterator[Sample | Dropped | Count]:
        """Samples of one unit, always the same and in the same order, and the records that could not be read."""


@dataclass
class Options:
    """How samples are checked and what happens to bad ones.

    Attributes:
        on_error: `fail` stops at the first bad record; `drop` leaves it out, counted and named in the manifest.
        max_drop_fraction: Of a split's records; more, and there is no manifest and the run fails.
        max_pixels, min_side: Limits of an image.
        shrink: Images whose shorter side is above this many pixels are made that small and stored as JPEG; null: every
            image is stored as its source has it, byte for byte.
        jpeg_quality: Of the images made smaller.
        tokenizer: Folder or name of a tokenizer; with it, token lengths and the share of supervised tokens go into the
            manifest.
        template: Text template of the token lengths.
        max_length: Longest accepted dialogue in tokens; needs `tokenizer`.
    """

    on_error: str = setting("fail", choices=("fail", "drop"))
    max_drop_fraction: float = setting(0.01, within="[0, 1]")
    max_pixels: int = setting(MAX_PIXELS, within="[1, 1e10]")
    min_side: int = setting(2, within="[1, 65536]")
    shrink: int | None = setting(None, within="[1, 65536]")
    jpeg_quality: int = setting(90, within="[1, 100]")
    tokenizer: str | None = setting(None, path=True)
    template: str = setting("chat", choices=NAMES)
    max_length: int | None = setting(None, within="[1, 1e7]")

    def check(self, prefix: str = "options.") -> None:
        """Rules across keys.

        Raises:
            ConfigError: names the first key with an impossible value.
        """
        if self.shrink is not None and self.shrink < self.min_side:
            raise ConfigError(f"{prefix}shrink={self.shrink}: at least {prefix}min_side={self.min_side}")
        if self.max_length is not None and self.tokenizer is None:
            raise ConfigError(f"{prefix}max_length={self.max_length}: is in tokens and needs {prefix}tokenizer")


@dataclass
class Task:
    """The part of the work that is this process's: task `index` of `count` takes every `count`-th unit."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Task:
        """From `i/n`, 0-based, as in `$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT`.

        Raises:
            DataError: another form, or i not below n.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise DataError(f"task={text}: write i/n with 0 <= i < n, such as 0/16")
        return cls(int(index), int(count))


@dataclass
class Result:
    """What `prepare` did: manifests of complete splits, splits that wait for other tasks, and what was wrong with the
    shards that were damaged and made anew.
    """

    manifests: dict[str, Manifest] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    waiting: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def prepare(
    source: Source,
    folder: Path,
    options: Options | None = None,
    task: Task | None = None,
    workers: int = 1,
    progress: bool = False,
    overwrite: bool = False,
) -> Result:
    """Prepare all splits of `source` under `folder` (`<root>/<dataset>`).

    Args:
        source: What to read.
        folder: Where `<split>/` folders go.
        options: Checks and policy.
        task: The units to work on; default all.
        workers: Processes.
        progress: Whether to show a bar.
        overwrite: Whether data that are there and were made from something else may be replaced.

    Raises:
        DataError: such data, a bad record under `on_error=fail`, more than `max_drop_fraction` of a split dropped, or a
            split without a sample.
    """
    options, task = options or Options(), task or Task()
    check(options, "options.")
    # Not the policy: a shard is the same under any, and accepting more defects afterwards must not make it anew.
    fixed = {name: value for name, value in asdict(options).items() if name not in ("on_error", "max_drop_fraction")}
    made_from = {**source.made_from(), "options": fixed, "schema_version": SCHEMA_VERSION}
    key = digest(made_from)
    units = _plan(source, folder, key)
    for split in units:
        refuse_others(folder / split, made_from, overwrite)
    if task.count == 1:  # no other task is writing there
        for place in (folder, *(folder / split for split in units)):
            remove_temporaries(place)
    result = Result()
    # Every n-th of all units, finished or not: tasks that start at different times must share them out alike.
    jobs = [(split, number, unit) for split, listed in units.items() for number, unit in enumerate(listed)]
    mine = jobs[task.index :: task.count]
    result.damaged = list(damaged(folder, [job[:2] for job in mine], key, workers).values())
    finished = {split: complete(folder / split, key) for split in units}
    # A split whose manifest is there and that lacks a shard all the same has lost it.
    todo = [job for job in mine if not _is_finished(folder / job[0], job[1], key)]
    stale = {split for split in units if finished[split] is None} | {split for split, _, _ in todo}
    work = partial(make_shard, source, folder, options, key)
    with tqdm(total=len(todo), unit="shard", disable=not progress, desc="prepare") as bar:
        samples = dropped = 0
        for shard in _run(work, todo, workers):
            samples += shard.samples
            dropped += sum(shard.dropped.values())
            rate = samples / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix(samples=samples, dropped=dropped, samples_s=f"{rate:.0f}")
            bar.update()
    for split, listed in units.items():
        if split not in stale and (kept := finished[split]) is not None:
            _check_drops(kept, options)
            result.manifests[split] = kept
            continue
        found = [read_receipt(folder / split, number) for number in range(len(listed))]
        shards = [shard for shard in found if shard is not None and shard.made_from == key]
        if missing := len(listed) - len(shards):
            result.waiting[split] = missing
            continue
        if not any(shard.samples or shard.dropped for shard in shards):
            raise DataError(
                f"{folder / split}: no sample; "
                + ("the source is empty" if split == "train" else "make its share larger (val_fraction, test_fraction)")
            )
        manifest = build_manifest(folder / split, shards, folder.name, split, made_from)
        _check_drops(manifest, options)
        write_manifest(folder / split, manifest)
        result.manifests[split] = manifest
        result.made.append(split)
    return result


def _plan(source: Source, folder: Path, key: str) -> dict[str, list[Any]]:
    """The source's plan, from `plan.json` where one of the tasks has made it before."""
    file = folder / PLAN
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["made_from"] == key and kept["checksum"] == digest(kept["units"]):
            return kept["units"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass  # none, of other data, or damaged: it is made again
    units = source.plan()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"made_from": key, "units": units, "checksum": digest(units)}) + "\n")
    return units


def make_shard(source: Source, folder: Path, options: Options, key: str, job: tuple[str, int, Any]) -> Shard:
    """Read, check and write one unit.

    Raises:
        DataError: its first bad record under `on_error=fail`.
    """
    split, number, unit = job
    verifier = Verifier(options.max_pixels, options.min_side, _token_counter(options), options.max_length)
    with ShardWriter(folder / split, number, key) as writer:
        for item in source.read(split, unit):
            if isinstance(item, Count):
                verifier.count(item.name, item.value, item.number)
                continue
            dropped = item if isinstance(item, Dropped) else verifier.check(item)
            if isinstance(item, Sample) and dropped is None:
                if options.shrink is not None:
                    _shrink(item, options.shrink, options.jpeg_quality, verifier)
                writer.add(item)
            elif dropped is None:
                raise TypeError(f"{type(source).__name__}.read gave a {type(item).__name__}")
            elif options.on_error == "drop":
                writer.drop(dropped)
            else:
                detail = f" ({dropped.detail})" if dropped.detail else ""
                raise DataError(
                    f"{folder.name}/{split}: sample {dropped.id}: {dropped.reason}{detail}; "
                    "correct the source, or leave such samples out with options.on_error=drop"
                )
        writer.receipt.statistics = {
            name: dict(sorted(counts.items())) for name, counts in sorted(verifier.statistics.items())
        }
    return writer.receipt


def _run(work: Any, todo: list[tuple[str, int, Any]], workers: int) -> Iterator[Shard]:
    if workers <= 1 or len(todo) <= 1:
        yield from map(work, todo)
        return
    # Spawned, not forked: Arrow and tokenizers run threads of their own.
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, job) for job in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, as the system does to one that takes too much memory; "
                "run the same command again, with fewer workers: finished shards are kept"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_finished(folder: Path, number: int, key: str) -> bool:
    receipt = read_receipt(folder, number)
    return receipt is not None and receipt.made_from == key


def _check_drops(manifest: Manifest, options: Options) -> None:
    dropped = sum(manifest.dropped.values())
    fraction = dropped / max(1, dropped + manifest.samples)
    accepted = options.max_drop_fraction if options.on_error == "drop" else 0
    if fraction > accepted:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
        first = manifest.dropped_examples[0]
        raise DataError(
            f"{manifest.dataset}/{manifest.split}: {dropped} of {dropped + manifest.samples} records are bad "
            f"({fraction:.2%}, accepted are {accepted:.2%}): {reasons}; "
            f"the first is {first['id']} ({first['reason']}: {first['detail']}). Correct the source, or accept them: "
            "options.on_error=drop with a larger options.max_drop_fraction; finished shards are kept"
        )


def _shrink(sample: Sample, side: int, quality: int, verifier: Verifier) -> None:
    for number, data in enumerate(sample.images):
        smaller = shrink(data, side, quality)
        if smaller is not data:
            sample.images[number] = smaller
            verifier.count("images made smaller", f"shorter side {side}")


def _token_counter(options: Options) -> TokenCounter | None:
    if options.tokenizer is None:
        return None
    return _counter(options.tokenizer, options.template)


@cache  # once per process: a tokenizer takes seconds to load
def _counter(tokenizer: str, template: str) -> TokenCounter:
    from transformers import AutoTokenizer

    from data_prep.text.dialogues import placed_images
    from data_prep.text.encoder import TextEncoder
    from model.batch import IGNORE

    encoder = TextEncoder(AutoTokenizer.from_pretrained(tokenizer), template)

    def count(dialogue: Dialogue) -> tuple[int, int, int]:
        labels = encoder.encode(dialogue, placed_images(dialogue)).labels
        unknown = 0 if encoder.unknown_id is None else labels.count(encoder.unknown_id)
        return len(labels), sum(label != IGNORE for label in labels), unknown

    return count
