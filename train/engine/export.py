"""Weights that leave a run, as the self-describing folder that `vlora` reads: RUN_DIR/export (see `vlora.folder`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.files import sync
from data_prep.store.pixels import load_preprocessor
from model.config import ModelConfig
from model.connectors import Connector
from model.decoder.lora import is_adapted, merge, save_adapters
from model.loading import ModelError, fingerprint, pretrained_config
from train.config import DTYPES, RunConfig
from train.engine.checkpoint import CheckpointError
from train.measure import card
from train.process import distributed
from train.process.run_files import RunDir
from vlora import folder as folders
from vlora.chat_templates import chat_template
from vlora.configuration import VLoRAConfig
from vlora.processing import VLoRAImageProcessor, VLoRAProcessor

if TYPE_CHECKING:  # DeepSpeed takes seconds to import and evaluation has no need of it
    from train.engine.engine import Engine


FOLDER = folders.EXPORT


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
    engine: Engine, run_dir: Path, tokenizer: PreTrainedTokenizerBase, config: RunConfig, identity: dict[str, str]
) -> Path:
    """Write the export of a finished stage, replacing an earlier one. Collective.

    Parts that were trained, in this stage or in one before it, are written; of the others their place and fingerprint.
    An LLM trained through adapters is written with them folded in, and they are written beside it.

    Raises:
        CheckpointError: it cannot be written.
    """
    model, main = engine.model, distributed.rank() == 0
    folder, temporary = RunDir(run_dir).export, run_dir / f".{FOLDER}.writing"
    connector = dict(full_tensors(model.connector))
    every = {"llm": model.llm} | ({} if model.vision is None else {"vision": model.vision.encoder})
    trained = {
        n: p for n, p in every.items() if any(x.requires_grad for x in p.parameters()) or exported_part(config, n)
    }
    adapted = is_adapted(model.llm)
    own = {
        # Of adapters the fp32 masters are merged.
        name: dict(full_tensors(part, None if adapted and name == "llm" else next(part.parameters()).dtype))
        for name, part in trained.items()
    }
    if main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if adapted:
                start = _place(exported_part(config, "llm") or config.llm.path)
                save_adapters(model.llm, own["llm"], start, temporary / folders.LORA)
                own["llm"] = merge(model.llm, own["llm"], model.llm.dtype)
            parts: dict[str, Any] = {}
            for name, path in (("llm", config.llm.path), ("vision", config.vision.path)):
                base = {"path": _place(path), "fingerprint": identity[name]}
                parts[name] = base | {"base": None}
                if name in own:
                    _save_part(trained[name], own[name], temporary / name)
                    parts[name] = {"path": name, "fingerprint": fingerprint(str(temporary / name)), "base": base}
                elif (earlier := exported_part(config, name)) is not None:  # its features are cached: not in the model
                    shutil.copytree(earlier, temporary / name)
                    parts[name] = {"path": name, "fingerprint": fingerprint(str(earlier)), "base": base}
            if "llm" in own:
                tokenizer.save_pretrained(temporary / "llm")
            vision_config = pretrained_config("vision", config.vision.path, config.vision.architecture)
            dtype = str(DTYPES[config.engine.precision]).removeprefix("torch.")
            described = VLoRAConfig.of(config.model, parts, dtype, model.llm.config, vision_config)
            template, images = config.data.template, VLoRAImageProcessor.of(load_preprocessor(config.vision))
            processor = VLoRAProcessor(images, tokenizer, template, chat_template(template, tokenizer))
            folders.write(temporary, described, connector, processor, folders.generation_config(processor))
            folders.seal_folder(temporary)
            card.write(run_dir, temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            sync(run_dir)
        except OSError as error:
            raise CheckpointError(f"export to {folder} failed ({error}); the checkpoints are untouched") from error
    distributed.barrier()
    return folder


def _place(path: str | Path) -> str:
    """A folder from its root, or a name as it is."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(path)


def _save_part(part: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    # A tied head has no parameter of its own: save_pretrained leaves it out as it does for any tied model.
    caches = getattr(part.config, "use_cache", None)
    if caches is not None:  # off in training only
        part.config.use_cache = True
    part.save_pretrained(folder, state_dict=tensors, max_shard_size="4GB")
    if caches is not None:
        part.config.use_cache = caches


def exported_part(config: RunConfig, part: str) -> Path | None:
    """Folder of the trained `llm` or `vision` that a run starts from, or None where it starts from the base model."""
    return None if config.init_from is None else trained_part(Path(config.init_from), part)


def trained_part(run_dir: Path, part: str) -> Path | None:
    """Folder of the trained `llm` or `vision` of a run, or None where that run kept the base model.

    Raises:
        DamagedFile: the export is not what was written.
    """
    for folder in (RunDir(run_dir).export / part, run_dir / part):
        folders.verify(folder.parent)
        if folder.is_dir() and (folder / "config.json").is_file():
            return folder
    return None


def load_connector(connector: Connector, run_dir: Path, config: ModelConfig, identity: dict[str, str]) -> None:
    """Fill a plain (not partitioned) connector with a run's exported weights.

    Raises:
        CheckpointError: no export there, another connector or sizes, or another base LLM or vision encoder.
    """
    try:
        folder = folders.find(run_dir, local_files_only=True)
    except ModelError as error:
        raise CheckpointError(f"{run_dir} has no finished export ({error}); let that run finish first") from error
    theirs = folders.read_config(folder)
    parts = theirs.parts or {}
    for part in ("llm", "vision"):
        base = parts[part]["base"] or parts[part]
        if base["fingerprint"] != identity[part]:
            raise CheckpointError(
                f"{run_dir} was trained with another {part} (fingerprint {base['fingerprint']}, here "
                f"{identity[part]}); use that {part}, its deltas mean nothing to another one"
            )
    for group in connector.reads:
        ours = asdict(getattr(config, group))
        for key, value in getattr(theirs, group).items():
            if ours.get(key) != value:
                raise CheckpointError(f"{run_dir} has {group}.{key}={value}, but this run asks for {ours.get(key)}")
    connector.load_state_dict(folders.read_connector(folder))
