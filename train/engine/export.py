"""Weights that leave a run: what the next stage, the evaluation and other programs read.

RUN_DIR/export/connector.safetensors   the connector, feature statistics included, fp32
RUN_DIR/export/llm/                    a Hugging Face folder, when the LLM was trained
RUN_DIR/export/export.json             what they belong to
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.files import write_atomically
from model.config import ModelConfig
from model.connectors import Connector
from train.engine.checkpoint import CheckpointError
from train.process import distributed

if TYPE_CHECKING:  # DeepSpeed takes seconds to import and evaluation has no need of it
    from train.engine.engine import Engine


FOLDER = "export"


def full_tensors(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer of `module` on the CPU, whole, by its own name. Collective under ZeRO-3.

    Trained parameters come as their fp32 masters, so a bf16 run loses nothing between stages; frozen ones and buffers
    as they are; parameters in `dtype` if given. Yields on every rank; only rank 0 gets tensors (others empty ones).
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    persistent = set(module.state_dict(keep_vars=True))
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is not None:
            value = master
        elif hasattr(parameter, "ds_id"):
            with GatheredParameters([parameter]):
                value = parameter.detach().clone()
        else:
            value = parameter.detach()
        yield name, value.to("cpu", dtype).contiguous() if distributed.rank() == 0 else torch.empty(0)
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield name, buffer.detach().cpu().contiguous()


def export(
    engine: Engine, run_dir: Path, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, identity: dict[str, str]
) -> Path:
    """Write the export of a finished stage, replacing an earlier one. Collective.

    Raises:
        CheckpointError: it cannot be written.
    """
    model, main = engine.model, distributed.rank() == 0
    folder, temporary = run_dir / FOLDER, run_dir / f".{FOLDER}.writing"
    llm_trained = any(p.requires_grad for p in model.llm.parameters())
    connector = dict(full_tensors(model.connector))
    dtype = next(model.llm.parameters()).dtype
    llm = dict(full_tensors(model.llm, dtype)) if llm_trained else {}
    if main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(connector, temporary / "connector.safetensors")
            if llm_trained:
                # A tied head has no parameter of its own: save_pretrained leaves it out as it does for any tied model.
                model.llm.save_pretrained(temporary / "llm", state_dict=llm, max_shard_size="4GB")
                tokenizer.save_pretrained(temporary / "llm")
            record = {
                "connector": asdict(config.connector),
                "generator": asdict(config.generator),
                "identity": identity,
            }
            write_atomically(temporary / "export.json", json.dumps(record, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except OSError as error:
            raise CheckpointError(f"export to {folder} failed ({error}); the checkpoints are untouched") from error
    distributed.barrier()
    return folder


def exported_llm(run_dir: Path) -> Path | None:
    """Folder of the finetuned LLM of a run, or None when that run kept the base model."""
    folder = run_dir / FOLDER / "llm"
    return folder if folder.is_dir() else None


def load_connector(connector: Connector, run_dir: Path, config: ModelConfig, identity: dict[str, str]) -> None:
    """Fill a plain (not partitioned) connector with a run's exported weights.

    Raises:
        CheckpointError: no export there, another connector or sizes, or another base LLM or vision encoder.
    """
    folder = run_dir / FOLDER
    if not (folder / "export.json").is_file():
        raise CheckpointError(
            f"{run_dir} has no finished export ({folder / 'export.json'} is missing); let that run finish first"
        )
    record = json.loads((folder / "export.json").read_text())
    for key in ("llm", "vision"):
        if record["identity"][key] != identity[key]:
            raise CheckpointError(
                f"{run_dir} was trained with another {key} (fingerprint {record['identity'][key]}, here "
                f"{identity[key]}); use that {key}, its deltas mean nothing to another one"
            )
    for group in connector.reads:
        ours = asdict(getattr(config, group))
        for key, value in record[group].items():
            if ours.get(key) != value:
                raise CheckpointError(f"{run_dir} has {group}.{key}={value}, but this run asks for {ours.get(key)}")
    connector.load_state_dict(load_file(folder / "connector.safetensors"))
