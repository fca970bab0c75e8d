"""`python -m train.adapter run=RUN image=FILE out=FOLDER`: one image's weights as a standard LoRA adapter.

Prints what merging them into the run's LLM would lose by rounding, then writes the file pair that PEFT reads.
`types=q,k,v,o` leaves the others out; `m`, which LoRA has no form for, must be left out by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.errors import run_cli
from common.settings import setting
from model.config import parse_types
from model.connectors import connector_class
from model.deploy.adapter import save_adapter
from model.deploy.merging import merged
from train import config as configuration
from train.config import ConfigError, MovedTo
from train.data import load_preprocessor
from train.engine.export import trained_part
from train.evaluate import load_model
from train.process import distributed


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        run: Run directory with an export of connector `vlora`.
        image: An image file.
        out: Folder of the adapter.
        types: What to write; null: everything placed.
        llm, vision: `llm.path=...`, `vision.path=...`: where the run's base models are now, if they have moved.
    """

    run: str = setting("???", path=True)
    image: str = setting("???", path=True)
    out: str = setting("???", path=True)
    types: str | None = None
    llm: MovedTo = field(default_factory=MovedTo)
    vision: MovedTo = field(default_factory=MovedTo)


def main() -> int:
    """Write one adapter."""
    options: Options = configuration.parse_options(Options, sys.argv[1:], __doc__)
    run = Path(options.run)
    config = configuration.load(run / "config.yaml", options.llm, options.vision)
    if not connector_class(config.model).makes_weights:
        raise ConfigError(f"{run} has connector={config.connector.name}, which makes no weights; take a run of vlora")
    types = None if options.types is None else parse_types(options.types)
    views = load_preprocessor(config.vision)(Path(options.image).read_bytes())
    distributed.quiet()
    model = load_model(config, run, torch.device("cpu"))
    with torch.no_grad():
        features = model.encode(views.to(next(model.parameters()).dtype)).to(model.llm.dtype)
        one_sample = torch.zeros(len(views), dtype=torch.int64)
        weights = model.connector(features, one_sample, features.new_ones(len(views)), 1).weights
        with merged(model.llm, weights, 0) as report:
            print(report)
    base = trained_part(run, "llm") or config.llm.path
    save_adapter(Path(options.out), model.llm, weights, 0, str(base), types)
    print(f"adapter: {options.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
