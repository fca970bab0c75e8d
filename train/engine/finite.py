"""Why a loss is not finite: which part's weights, or which sample."""

from __future__ import annotations

import torch
from torch import nn

from model.batch import Batch
from train.engine.engine import Engine
from train.process import distributed


def explain(engine: Engine, batches: list[Batch], samples: list[list[str]]) -> str:
    """The cause of a loss that is NaN or infinite, in one line. Collective.

    Args:
        engine: Whose loss it is.
        batches: This rank's micro-batches of the step.
        samples: Shard and id of each of their samples.
    """
    if bad := bad_weights(engine.model):
        return bad
    found = next(filter(None, distributed.gather(_bad_features(engine, batches, samples))), None)
    if found:
        return f"the vision encoder's features of {found} are not finite, though its weights are"
    seen = [sample for part in distributed.gather(samples) for micro in part for sample in micro]
    return (
        f"weights and features are finite, so a value overflows in {engine.config.engine.precision} in the connector "
        f"or the LLM; the step's samples are {', '.join(seen[:4])}{', ...' if len(seen) > 4 else ''}. Try "
        "engine.precision=fp32"
    )


def bad_weights(model: nn.Module) -> str | None:
    """The first parameter of a model that holds NaN or infinity, in one line; None: there is none. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    for name, parameter in model.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with GatheredParameters(partitioned, enabled=bool(partitioned)):
            count = int((~parameter.detach().isfinite()).sum())
            size = parameter.numel()
        if count:
            part = name.split(".", 1)[0]
            source = {"llm": "llm.path", "vision": "vision.path"}.get(part, "init_from, or the checkpoint")
            return (
                f"{count} of {size} values of the weight {name} are NaN or infinite; the {part} it comes from "
                f"({source}) is damaged or was not trained soundly"
            )
    return None


@torch.no_grad()
def _bad_features(engine: Engine, batches: list[Batch], samples: list[list[str]]) -> str | None:
    found = None
    for batch, names in zip(batches, samples, strict=True):  # all of them: ZeRO-3 needs every rank in step
        features = engine.model.encode(batch.images.to(engine.device))
        bad = (~features.isfinite()).flatten(1).any(1).cpu() & (batch.image_weight > 0).cpu()
        if found is None and bad.any():
            at = int(batch.image_to_sample[int(bad.nonzero()[0])])
            found = names[at] if at < len(names) else f"sample {at} of a micro-batch"
    return found
