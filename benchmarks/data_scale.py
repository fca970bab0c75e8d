"""A million synthetic pairs prepared and gone through in the training order; a JSON file of LLaVA's size streamed.

    python -m benchmarks.data_scale OUT                       # prepares OUT/synthetic (1 GB), unless it is there
    python -m benchmarks.data_scale OUT --samples 100000

Rates, and the memory of each process, as JSON. The loader is the training loader on the tiny LLM's tokenizer: text
templates, JPEG decode, batches. The order alone is gone through as well, for a whole epoch, and must show every sample
once. Then a process that loads as two ranks is killed around the end of the epoch: what it has loaded and what goes on
from its last state, on two ranks and on others, must be what an undisturbed one loads. Memory is private (anonymous)
and total resident memory, from the kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parts that measure their own process import no more than they need
    from model.batch import Batch
    from train.data import TrainLoader

SIDE = 16


def memory(pid: int) -> dict[str, int]:
    """Resident memory of a process by kind, in bytes; empty when it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith(("Rss", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


class Watch:
    """Peak memory of this process's children and of itself, sampled ten times a second while the block runs."""

    def __enter__(self) -> Watch:
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._stop.wait(0.1):
            for process in [me, *me.children(recursive=True)]:
                found = memory(process.pid)
                private = found.get("RssAnon", 0) + found.get("RssShmem", 0)
                kind = "self" if process.pid == me.pid else "child"
                for name, value in (("private", private), ("resident", found.get("VmRSS", 0))):
                    key = f"{kind}_{name}_mb"
                    self.peaks[key] = max(self.peaks.get(key, 0), value >> 20)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def prepare(out: Path, samples: int, workers: int) -> dict:
    """Run the real command; nothing is done when the set is there."""
    command = [sys.executable, "-m", "data_prep", "source=synthetic", f"source.samples={samples}"]
    command += [f"root={out}", f"workers={workers}", f"source.side={SIDE}"]
    start = time.perf_counter()
    with Watch() as watch:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = {name: value for name, value in watch.peaks.items() if name.startswith("child")}
    return {
        "said": said,
        "seconds": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "workers": workers,
        **peaks,
    }


def stream_json(out: Path, records: int = 665_298) -> dict:
    """Plan and read a file as large as LLaVA's mix (1 GB); memory is this process's own, so run it first."""
    from data_prep.sources import json_stream

    def peak_mb() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    out.mkdir(parents=True, exist_ok=True)
    file = out / "mix.json"
    turns = [{"from": ("human", "gpt")[n % 2], "value": "lorem ipsum dolor sit amet " * 4} for n in range(10)]
    try:
        with file.open("w") as stream:
            for number in range(records):
                record = {"id": f"{number:012d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}
                stream.write(("[", ", ")[number > 0] + json.dumps(record))
            stream.write("]")
        before, start = peak_mb(), time.process_time()
        ends = json_stream.boundaries(file, 5000)
        planned = time.process_time() - start
        count = sum(1 for span in zip(ends, ends[1:], strict=False) for _ in json_stream.read(file, *span))
        seconds = {"plan_cpu_s": round(planned, 1), "read_cpu_s": round(time.process_time() - start - planned, 1)}
        sizes = {"bytes": file.stat().st_size, "records": count}
        return {**sizes, **seconds, "resident_mb_before": before, "resident_mb_peak": peak_mb()}
    finally:
        file.unlink(missing_ok=True)


def make_loader(
    out: Path, tokenizer: str, batch_size: int, rank: int = 0, world_size: int = 1, **options: Any
) -> TrainLoader:
    """The training loader on `out/synthetic/train`; `options` are those of `DataConfig`."""
    from transformers import AutoTokenizer

    from train.data import DataConfig, PixelPreprocessor, SourceConfig, TrainLoader

    image = PixelPreprocessor("resize", SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
    source = SourceConfig(path="synthetic/train")
    config = DataConfig(root=str(out), train=[source], batch_size=batch_size, template="qa", max_length=None, **options)
    return TrainLoader(config, AutoTokenizer.from_pretrained(tokenizer), image, 0, rank, world_size)


def go_through(loader: TrainLoader) -> None:
    """One epoch of the order.

    Raises:
        AssertionError: it does not show every sample once.
    """
    import numpy as np

    shown = np.zeros(loader.epoch_size, np.int64)
    for start in range(0, loader.epoch_size, 4096):
        shown[loader.order(start, min(4096, loader.epoch_size - start)).sample] += 1
    assert (shown == 1).all(), f"{(shown != 1).sum()} samples of {len(shown)} are not shown once"


def iterate(out: Path, tokenizer: str, steps: int, batch_size: int, workers: int) -> dict:
    """The epoch's order, then `steps` steps of the loader as rank 1 of 2, in this process or in workers."""
    import torch
    from transformers import AutoTokenizer

    import train.data.loader  # noqa: F401

    torch.set_num_threads(1)
    AutoTokenizer.from_pretrained(tokenizer)  # loads more of the libraries
    with Watch() as watch:
        loaded = memory(os.getpid())
        loader = make_loader(out, tokenizer, batch_size, 1, 2, num_workers=workers)
        start = time.process_time()
        go_through(loader)
        order_s = time.process_time() - start
        on_cpu, on_wall = time.process_time(), time.perf_counter()
        rows = sum(len(batch.input_ids) for _ in range(steps) for batch in next(loader))
        loader_s = time.perf_counter() - on_wall if workers else time.process_time() - on_cpu
    return {
        "order_samples_per_cpu_s": round(loader.epoch_size / order_s),
        "loader_samples_per_s" if workers else "loader_samples_per_cpu_s": round(rows / loader_s),
        "loader_samples": rows,
        "workers": workers,
        "libraries_private_mb": (loaded.get("RssAnon", 0)) >> 20,
        "libraries_resident_mb": loaded.get("VmRSS", 0) >> 20,
        **{name: value for name, value in watch.peaks.items() if workers or name.startswith("self")},
    }


@dataclass(frozen=True)
class Loaded:
    """What all ranks got for a step.

    Attributes:
        samples: A digest of every sample (tokens, targets and pixels without padding), sorted.
        batches: A digest of every rank's micro-batches, bit by bit.
        next: The loader's state after it.
    """

    samples: list[str]
    batches: list[str]
    next: dict[str, int]


def load_steps(
    out: Path, tokenizer: str, state: dict[str, int], steps: int, world_size: int, **options: Any
) -> Iterator[Loaded]:
    """`steps` steps from `state` on, as all the ranks."""
    ranks = [make_loader(out, tokenizer, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for rank in ranks:
        rank.load(state)
    for _ in range(steps):
        got = [batch for rank in ranks for batch in next(rank)]
        samples = sorted(digest for batch in got for digest in _samples(batch))
        batches = [_digest(*(getattr(batch, field.name) for field in fields(batch))) for batch in got]
        yield Loaded(samples, batches, ranks[0].state())


def _samples(batch: Batch) -> Iterator[str]:
    real = batch.attention_mask.bool()
    for sample in range(batch.n_samples):
        rows = (batch.row_to_sample == sample).nonzero().flatten().tolist()
        texts = [tensor[row][real[row]] for row in rows for tensor in (batch.input_ids, batch.labels)]
        yield _digest(*texts, batch.images[(batch.image_to_sample == sample) & (batch.image_weight > 0)])


def _digest(*values: Any) -> str:
    content = hashlib.sha256()
    for value in values:
        content.update(value.numpy().tobytes() if hasattr(value, "numpy") else str(value).encode())
    return content.hexdigest()


def _record(file: Path, *arguments: Any, **options: Any) -> None:
    """`load_steps` in a process of its own, which may be killed at any time: a line per step."""
    with file.open("w") as stream:
        for loaded in load_steps(*arguments, **options):
            print(json.dumps(vars(loaded)), file=stream, flush=True)


def resume(out: Path, tokenizer: str, batch_size: int, group_by: str, steps: int = 24) -> dict:
    """Kill a process that loads as two ranks, around the end of an epoch, and go on from its last state.

    Raises:
        AssertionError: what is loaded differs from an undisturbed run.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "group_by": group_by, "group_window": 8}
    one = make_loader(out, tokenizer, **options)
    start = {"step": one.epoch_size // batch_size - steps // 2}
    expected = list(load_steps(out, tokenizer, start, steps, 2, **options))
    assert expected[0].next["epoch"] == 0 and expected[-1].next["epoch"] == 1

    file = out / "resume.jsonl"
    file.unlink(missing_ok=True)
    arguments = (file, out, tokenizer, start, steps, 2)
    process = multiprocessing.get_context("spawn").Process(target=_record, args=arguments, kwargs=options)
    process.start()
    while not file.exists() or file.read_text().count("\n") < steps // 3:
        assert process.is_alive(), "the process that was to be killed ended by itself"
        time.sleep(0.01)
    process.kill()
    process.join()
    complete = file.read_text().rpartition("\n")[0].splitlines()
    file.unlink()
    before = [Loaded(**json.loads(line)) for line in complete]
    assert before == expected[: len(before)], "before the kill"
    state, left = before[-1].next, steps - len(before)
    assert list(load_steps(out, tokenizer, state, left, 2, **options)) == expected[len(before) :], "on two ranks"
    on_one = list(load_steps(out, tokenizer, state, left // 2, 1, **options))
    on_four = list(load_steps(out, tokenizer, on_one[-1].next, left - left // 2, 4, **options))
    after = [(step.samples, step.next) for step in on_one + on_four]
    assert after == [(step.samples, step.next) for step in expected[len(before) :]], "on one rank, then on four"
    return {"group_by": group_by, "steps": steps, "samples": steps * batch_size, "killed_after_steps": len(before)}


def main() -> None:
    """Print one JSON object per part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", default=".cache/llm/tiny-llama")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--loader-workers", type=int, default=0)
    parts = ("json", "prepare", "iterate", "resume")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    measure = {
        "json": lambda: stream_json(arguments.out),
        "prepare": lambda: prepare(arguments.out, arguments.samples, arguments.workers),
        "iterate": lambda: iterate(
            arguments.out, arguments.tokenizer, arguments.steps, arguments.batch_size, arguments.loader_workers
        ),
        "resume": lambda: [
            resume(arguments.out, arguments.tokenizer, arguments.batch_size, group_by)
            for group_by in ("none", "length")
        ],
    }
    for name in arguments.parts:
        print(json.dumps({name: measure[name]()}), flush=True)


if __name__ == "__main__":
    main()
