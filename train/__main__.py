"""`python -m train [overrides]`: compose and check the configuration, make the run directory, start the workers.

python -m train stage=pretrain
python -m train stage=finetune init_from=outputs/RUN
python -m train -m generator.rank=16,32,64 generator.num_blocks=4,8
python -m train -m hydra/launcher=slurm generator.rank=16,32,64      # one job array instead
python -m train experiment=vlora_7b check=true        # everything but the training
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from common import options
from common.errors import report_errors, run_cli
from train import config as configuration
from train.cluster import sweep
from train.config import presets
from train.process import launch, run_dir
from train.process.distributed import quiet


def check_model(config: configuration.RunConfig, workers: int) -> str:
    """Build the model on the meta device and return its table; with `check=true` also the memory plan.

    Raises:
        ValueError: sizes that do not fit the parts.
    """
    import torch

    from model.vlm import build_model
    from train.engine.engine import freeze
    from train.measure.summary import describe

    model = build_model(config.model, torch.bfloat16, meta=True)
    freeze(model, config.stage)
    table = describe(model)
    return f"{table}\n\n{plan_memory(config, workers)}" if config.check else table


def plan_memory(config: configuration.RunConfig, workers: int) -> str:
    """The memory plan of a rank as text; lengths from the data where tokenizer and data are here.

    Raises:
        ValueError: what is wrong with the tokenizer, the data, or how these are turned into text.
    """
    import torch

    from model.loading import load_tokenizer
    from train.measure import memory

    tokenizer = None if configuration.missing_models(config) else load_tokenizer(config.llm.path)
    share = config.data.batch_size // workers // configuration.accumulation(config, workers)
    load = memory.workload(config, tokenizer, share)
    # A local run is on this machine's GPUs or, without any, in its memory.
    local = torch.device("cuda" if torch.cuda.is_available() else "cpu") if config.launch.mode == "local" else None
    limit = memory.available(config, local, workers)
    try:
        found = memory.plan(config, workers, load)
    except memory.UnknownMemory as error:
        if config.engine.gradient_checkpointing == "auto":  # which the run would decide by that plan
            raise
        return str(error).partition(": ")[0]
    if limit is not None and local is not None and local.type == "cpu":
        limit -= found.host
    return memory.describe(config, workers, load, found, limit)


@hydra.main(version_base="1.3", config_path=str(presets.CONF), config_name="config")
def _main(composed: DictConfig) -> None:
    # Reported here: Hydra would add lines of its own to an exception. A sweep goes on only if this returns.
    if code := report_errors(lambda: _enter(composed)):
        sys.exit(code)


def _enter(composed: DictConfig) -> int:
    configuration.check_words(composed, HydraConfig.get().overrides.task)
    return run(sweep.enter(composed))


def run(composed: DictConfig) -> int:
    """Check one composed configuration and run it."""
    import torch

    from train.process import inputs

    torch.set_num_threads(1)  # a process with OpenMP threads could not be forked into workers
    config = configuration.resolve(composed)
    quiet()
    workers = launch.worker_count(config)
    configuration.accumulation(config, workers)
    absent = inputs.require(config)
    table = check_model(configuration.located(config), workers)
    if config.check:
        print("\n".join([*(f"not here: {line}" for line in absent), table]))
        return 0
    path = run_dir.create(config)
    print(f"run directory: {path}", flush=True)
    if config.launch.mode == "none":
        print("".join(f"not here yet: {line}\n" for line in absent), end="")
        return 0
    if launch.run(config, path):
        print(f"{path}: finished")
        return 0
    print(f"{path}: stopped on request; the same command{sweep.same()} goes on from the checkpoint")
    sys.exit(0)  # whoever stops a point stops its sweep


def main() -> int:
    """Run Hydra's program on words that it reads as they were typed, with its errors turned into ours."""
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(f"{(__doc__ or '').strip()}\n\n{presets.help_text()}\n\n{options.help_text(configuration.RunConfig)}")
        return 0
    sys.argv[1:] = options.as_typed(words, configuration.RunConfig, presets.is_sweep(words))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raises, where Hydra would print a shortened traceback
    sweep.register_launchers()
    try:
        _main()
    except (HydraException, OmegaConfBaseException) as error:
        raise configuration.explain(error) from error
    return 0


if __name__ == "__main__":
    run_cli(main)
