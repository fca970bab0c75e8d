"""Parameters that DeepSpeed ZeRO-3 has taken apart when a backward needs them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def gathered(weights: Iterable[Tensor]) -> Iterator[None]:
    """Hold `weights` whole inside the block; those found partitioned are partitioned again after it.

    With non-reentrant checkpointing the recomputed forward releases a weight before the backward of the op reads it;
    DeepSpeed's own linear function gathers it again in the same way. Recognised by the attributes that
    `deepspeed.zero` puts on a parameter, so plain tensors cost one attribute lookup and DeepSpeed is not imported.
    """
    missing = [w for w in weights if hasattr(w, "ds_id") and w.ds_status.name == "NOT_AVAILABLE"]
    try:
        for w in missing:
            w.all_gather()
        yield
    finally:
        for w in missing:
            w.partition()
