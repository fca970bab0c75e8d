"""A run directory with an export, made in seconds: random weights that see, and a split whose answers it half knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from data_prep.store.sample import Sample
from data_prep.store.split import Split
from data_prep.store.writer import write_split
from model.config import ConnectorConfig, GeneratorConfig, VisionConfig
from tests.train import world
from tests.vlora.conftest import make_folder
from train import config as configuration
from train.config import compose_overrides, resolve
from train.process.run_files import RunDir


def make_run(parts: Path, run: Path, connector: str = "vlora") -> Path:
    """A finished run of the world in `parts`; its `data.test` is `squares/val`.

    Args:
        parts: What `world.make` made.
        run: Made.
        connector: `vlora` or `mlp`.
    """
    run.mkdir(parents=True)
    make_folder(parts, RunDir(run).export, connector)
    given = [word for word in world.overrides(parts, run) if not word.startswith("data.test")]
    words = ["data.template=qa", "data.test=squares/val", "evaluation.max_new_tokens=6"]
    config = resolve(compose_overrides([*given, *words, f"connector={connector}"]))
    # As `make_folder` has them.
    config.vision = VisionConfig(path=config.vision.path, layer=-1, image_size=28)
    config.generator = GeneratorConfig(num_blocks=1, width=16, num_heads=2, rank=4, every=2, types="qkvom")
    config.connector = ConnectorConfig(name=connector, num_queries=3, num_heads=2, num_blocks=1)
    configuration.save(config, RunDir(run).config)
    RunDir(run).record.write_text(json.dumps({"id": "harness", "name": "harness"}))
    return run


def plant(parts: Path, predictions: list[dict], split: str) -> None:
    """Write a split with the questions of `squares/val` of which every second answer is what a model said."""
    said = {(each["sample"], each["dialogue"]): each["prediction"] for each in predictions}
    samples: list[Sample] = []
    for sample in Split(parts / "data" / "squares" / "val"):
        talks = [list(map(dict, talk)) for talk in sample.conversations]
        for number, talk in enumerate(talks):
            if (len(samples) + number) % 2:
                talk[-1]["content"] = said[sample.id, number] or "nothing"
        samples.append(replace(sample, conversations=talks))
    write_split(parts / "data" / split, samples)
