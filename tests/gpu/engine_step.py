"""Run as a program: three ZeRO-3 steps of the real engine on this device (world 1) against plain torch, fp32.

Prints one JSON line: the largest relative difference of the weights, and the backend of the process group.
"""

import copy
import json
import os
import socket

import torch
import torch.distributed as dist

from model.ops import set_backend
from tests.model import parts
from train.config import RunConfig, StageConfig, TrainedParts
from train.engine.engine import Engine, freeze, parameter_groups
from train.process import distributed


def configuration() -> RunConfig:
    """Everything trained, everything partitioned, nothing clipped."""
    config = RunConfig(stage=StageConfig(name="finetune", train=TrainedParts(llm=True)))
    config.engine.precision, config.engine.overlap_comm = "fp32", torch.cuda.is_available()
    config.engine.persistence_threshold = 0
    config.engine.gradient_checkpointing = True
    config.data.batch_size = 4
    config.optim.grad_clip, config.optim.lr.connector = 0.0, 1e-2
    config.optim.eps = 1e-3  # or a gradient that cancels to zero, up to rounding, would move its weight by a whole step
    config.optim.schedule, config.optim.warmup_ratio = "constant", 0.0
    return config


def main() -> None:
    """One process; prints the comparison."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    device = distributed.init(timeout_minutes=2)
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    config = configuration()
    reference = parts.build(parts.config()).to(device)
    model = copy.deepcopy(reference)
    freeze(reference, config.stage)
    freeze(model, config.stage)
    batches = [
        parts.batch(rows=[0, 1, 2, 3], images=[0, 3], seed=seed).to(device) for seed in range(3)
    ]  # two samples without an image

    set_backend("reference")
    groups = parameter_groups(reference, config.optim)
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.optim.betas), eps=config.optim.eps)
    reference.train()
    for batch in batches:
        optimizer.zero_grad()
        (reference(batch).loss_sum / batch.n_targets).backward()
        optimizer.step()

    set_backend("auto")
    engine = Engine(model, config, total_steps=10, accumulation=1)
    for batch in batches:
        output = engine.forward(batch)
        engine.backward(output.loss_sum, batch.n_targets)
        engine.micro_step()
        assert engine.result().applied
    worst = 0.0
    for (name, ours), theirs in zip(engine.model.named_parameters(), reference.parameters(), strict=True):
        with GatheredParameters([ours]):
            difference = (ours.detach() - theirs).norm() / theirs.norm().clamp(min=1e-6)
            worst = max(worst, difference.item())
            assert torch.isfinite(ours).all(), name
    print(json.dumps({"worst": worst, "backend": dist.get_backend(), "zero_stage": engine.zero_stage}), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
