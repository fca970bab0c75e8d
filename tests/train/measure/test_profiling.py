"""A traced step, and what is said when memory runs out."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch

from common.errors import UserError
from train.config import RunConfig
from train.measure.profiling import memory_explained, traced, what_to_lower


def test_only_the_steps_named_are_traced(tmp_path):
    config = RunConfig()
    config.debug.profile = [2]
    for step in (1, 2, 3):
        with traced(config, tmp_path, step):
            torch.ones(8, 8) @ torch.ones(8, 8)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step-000002-rank-0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_gpu_out_of_memory_is_one_line_that_says_what_to_lower(tmp_path):
    config = RunConfig()
    config.engine.micro_batch_size = 8
    message = "CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"
    with pytest.raises(UserError) as caught, memory_explained(config, tmp_path):
        raise torch.OutOfMemoryError(message)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("torch says: CUDA out of memory. Tried to allocate 20.00 GiB.")
    order = ["gradient_checkpointing=true", "micro_batch_size (now 8)", "offload_optimizer=true"]
    assert re.search(".*".join(map(re.escape, order)), said), said
    with pytest.raises(RuntimeError, match="^another$"), memory_explained(config, tmp_path):
        raise RuntimeError("another")


def test_what_is_used_already_is_not_proposed():
    config = RunConfig()
    config.engine.gradient_checkpointing = config.engine.offload_optimizer = True
    config.engine.micro_batch_size = 1
    assert what_to_lower(config) == "take more ranks or GPUs with more memory"
    config.engine.zero_stage = 2
    assert what_to_lower(config) == "try, in this order: engine.zero_stage=3 (weights shared among the ranks)"
