"""The loader against a plain loop of Pillow and the Hugging Face processor, in images per second of one core.

    python -m benchmarks.loader        photographs of several sizes to 336 pixels, every image mode

The photographs are made up: smooth noise of several scales with grain, JPEG quality 90, as large in bytes as real ones
of their size. Both sides start from the files' bytes and end with one float32 batch, in one process with one thread;
they take turns and each one's median CPU time counts, so that a busy machine slows both alike. Their results must be
equal, or the benchmark fails. Pillow's part of ours, decoding and scaling, is timed alone: equal pixels need it, so the
plain loop's time over it (`most`) is a ratio that no loader on Pillow can pass.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaNextImageProcessor

from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.store.pixels import grids
from data_prep.store.sample import Sample
from data_prep.store.writer import write_split
from data_prep.text.encoder import Encoded
from model.config import VisionConfig
from train.data import DataConfig, PixelPreprocessor, SourceConfig, TrainLoader, load_preprocessor
from train.data.collate import EncodedSample, collate

PAPER_SAMPLES = 246
"""Samples per second of the paper's pretraining (Table 7; LLaVA-v1.5: 106)."""
PHOTOGRAPHS = ((500, 375), (375, 500), (640, 427), (640, 480), (1024, 768))
SIZE = 336


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG file with the spectrum of a photograph, more or less."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(0, 6, (height, width, 3)).astype(np.float32)
    for scale in (4, 16, 64, 128):
        for channel in range(3):
            noise = rng.normal(0, scale, (max(2, height // scale), max(2, width // scale))).astype(np.float32)
            pixels[..., channel] += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    pixels = (pixels - pixels.min()) / np.ptp(pixels) * 255
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def plain_loop(processor: Any, files: list[bytes], **options: Any) -> Tensor:
    """What a data set's `__getitem__` and a collator usually do."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    return torch.cat(
        [processor(image, return_tensors="pt", **options)["pixel_values"].flatten(0, -4) for image in images]
    )


def padded(processor: Any, files: list[bytes]) -> Tensor:
    """LLaVA-1.5's square in the mean colour, then the processor."""
    out = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in processor.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        out.append(processor(square, return_tensors="pt")["pixel_values"])
    return torch.cat(out)


def ours(pixels: PixelPreprocessor, files: list[bytes]) -> Tensor:
    """The loader's way: `collate`."""
    pieces = [EncodedSample("benchmark", [data], [Encoded([1, 2], [-100, 2])]) for data in files]
    return collate(pieces, pixels, 0).images


def pillow(pixels: PixelPreprocessor, files: list[bytes]) -> None:
    """What ours asks of Pillow."""
    for data in files:
        pixels.views(pixels.picture(data))


def measure(folder: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """One record per kind of photograph and image mode."""
    edge = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    clip = CLIPImageProcessor(**edge)
    clip.save_pretrained(folder)
    pinpoints = [[SIZE * rows, SIZE * columns] for columns, rows in grids(VisionConfig.max_tiles)]
    tiles = LlavaNextImageProcessor(**edge, image_grid_pinpoints=pinpoints)
    loops: dict[str, Callable[[list[bytes]], Tensor]] = {
        "crop": lambda files: plain_loop(clip, files),
        "resize": lambda files: plain_loop(clip, files, size={"height": SIZE, "width": SIZE}, do_center_crop=False),
        "pad": lambda files: padded(clip, files),
        "tiles": lambda files: plain_loop(tiles, files),
    }
    records = []
    for width, height in PHOTOGRAPHS:
        files = [photograph(width, height, seed) for seed in range(count)]
        for mode, loop in loops.items():
            pixels = load_preprocessor(VisionConfig(path=str(folder), image_mode=mode))
            torch.testing.assert_close(ours(pixels, files), loop(files), atol=1e-5, rtol=0)

            taken: dict[str, list[float]] = {"plain": [], "ours": [], "pillow": []}
            runs: tuple[Callable[[list[bytes]], object], ...] = (loop, partial(ours, pixels), partial(pillow, pixels))
            for _ in range(repeats):
                for name, run in zip(taken, runs, strict=True):
                    started = time.process_time()
                    run(files)
                    taken[name].append((time.process_time() - started) / count)
            seconds = {name: median(values) for name, values in taken.items()}
            records.append(
                {
                    "photograph": f"{width}x{height}",
                    "kilobytes": sum(map(len, files)) / count / 1e3,
                    "mode": mode,
                    "plain images/s": 1 / seconds["plain"],
                    "images/s": 1 / seconds["ours"],
                    "ratio": seconds["plain"] / seconds["ours"],
                    "most": seconds["plain"] / seconds["pillow"],
                    "cores for 8 x A100": PAPER_SAMPLES * seconds["ours"],
                }
            )
    return records


def whole_loader(folder: Path, count: int, steps: int, repeats: int) -> float:
    """Samples per second of one core through `TrainLoader`, in this process: read, template, tokens, pixels, batch."""
    caption = "a photo of grain on smooth noise of several scales"
    talk = [[{"role": "user", "content": ""}, {"role": "assistant", "content": caption}]]
    sizes = [PHOTOGRAPHS[n % len(PHOTOGRAPHS)] for n in range(count)]
    write_split(folder / "set", [Sample(f"{n}", [photograph(*s, n)], talk, "made") for n, s in enumerate(sizes)])
    config = DataConfig(root=str(folder), train=[SourceConfig("set")], batch_size=count, template="bare")
    pixels = load_preprocessor(VisionConfig(path=str(folder), image_mode="crop"))
    loader = TrainLoader(config, build_tokenizer([caption]), pixels)
    next(loader)
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(steps):
            next(loader)
        rates.append(steps * count / (time.process_time() - started))
    return median(rates)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="photographs of each size")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        records = measure(Path(folder), arguments.images, arguments.repeats)
        rate = whole_loader(Path(folder), 4 * arguments.images, 2, arguments.repeats)
    print(f"{'photograph':<12}{'kB':>6}  {'mode':<8}{'plain/s':>9}{'ours/s':>9}{'ratio':>7}{'most':>7}{'cores':>7}")
    for r in records:
        print(
            f"{r['photograph']:<12}{r['kilobytes']:>6.0f}  {r['mode']:<8}{r['plain images/s']:>9.1f}"
            f"{r['images/s']:>9.1f}{r['ratio']:>7.2f}{r['most']:>7.2f}{r['cores for 8 x A100']:>7.2f}"
        )
    print("most: ratio to Pillow's decoding and scaling alone")
    print(f"cores: to feed 8 x A100 at the paper's {PAPER_SAMPLES} samples/s, pixels alone")
    print(f"whole loader, photographs of all sizes, crop: {rate:.1f} samples/s of one core", end="")
    print(f", {PAPER_SAMPLES / rate:.2f} cores")
    if arguments.json is not None:
        result = {"pixels": records, "whole loader samples/s": rate}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
