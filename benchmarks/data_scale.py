"""A million synthetic pairs prepared and gone through in the training order; a JSON file of LLaVA's size streamed.

    python -m benchmarks.data_scale OUT                       # prepares OUT/synthetic (1 GB), unless it is there
    python -m benchmarks.data_scale OUT --samples 100000

Rates, and the memory of each process, as JSON. The loader is the training loader on the tiny LLM's tokenizer: text
templates, JPEG decode, batches. The order alone is gone through as well, for a whole epoch. Memory is private
(anonymous) and total resident memory, from the kernel: pages of the mapped shards are resident too, but shared between
ranks and given back when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

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

    def __exit__(self, *error) -> None:
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
    from data_prep import json_stream

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


def iterate(out: Path, tokenizer: str, steps: int, batch_size: int) -> dict:
    """The epoch's order, then ``steps`` steps of the loader as rank 1 of 2, in this process."""
    import torch
    from transformers import AutoTokenizer

    from train.data.config import DataConfig, SourceConfig
    from train.data.loader import TrainLoader
    from train.data.pixels import PixelPreprocessor

    torch.set_num_threads(1)
    image = PixelPreprocessor("resize", SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
    source = SourceConfig(path="synthetic/train")
    config = DataConfig(root=str(out), train=[source], batch_size=batch_size, template="qa", max_length=None)
    with Watch() as watch:
        loaded = memory(os.getpid())
        loader = TrainLoader(config, AutoTokenizer.from_pretrained(tokenizer), image, seed=0, rank=1, world_size=2)
        start, seen = time.process_time(), 0
        while seen < loader.epoch_size:
            seen += len(loader.order(seen, min(4096, loader.epoch_size - seen)).sample)
        order_s = time.process_time() - start
        start = time.process_time()
        rows = sum(len(batch.input_ids) for _ in range(steps) for batch in next(loader))
        loader_s = time.process_time() - start
    return {
        "order_samples_per_cpu_s": round(seen / order_s),
        "loader_samples_per_cpu_s": round(rows / loader_s),
        "loader_samples": rows,
        "libraries_private_mb": (loaded.get("RssAnon", 0)) >> 20,
        "libraries_resident_mb": loaded.get("VmRSS", 0) >> 20,
        **{name: value for name, value in watch.peaks.items() if name.startswith("self")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", default=".cache/llm/tiny-llama")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--parts", nargs="+", choices=("json", "prepare", "iterate"), default=("json", "prepare", "iterate")
    )
    arguments = parser.parse_args()
    measure = {
        "json": lambda: stream_json(arguments.out),
        "prepare": lambda: prepare(arguments.out, arguments.samples, arguments.workers),
        "iterate": lambda: iterate(arguments.out, arguments.tokenizer, arguments.steps, arguments.batch_size),
    }
    for name in arguments.parts:
        print(json.dumps({name: measure[name]()}), flush=True)


if __name__ == "__main__":
    main()
