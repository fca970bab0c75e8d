"""One sample's perceptual weights as a standard LoRA adapter: PEFT's file pair, and GGUF for llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import share
from model.generator.placement import Site, decoder_layers
from model.generator.weights import PerceptualWeights
from model.ops.merge import WHY_NOT_M

_GGUF_NAMES = {"mistral": "llama", "phi": "phi2"}
"""llama.cpp's architecture, where it is not transformers' `model_type`."""
_INTERLEAVED = ("llama",)
"""Architectures whose GGUF files keep the two rotary halves of every head of q and k interleaved."""


def save_adapter(
    folder: Path,
    llm: nn.Module,
    weights: PerceptualWeights,
    sample: int,
    base: str,
    types: tuple[str, ...] | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (PEFT's LoRA format).

    PEFT computes W x + lora_alpha / r * B' A' x, with A' = Aᵀ [r, d_in] and B' = Bᵀ [d_out, r].

    Args:
        folder: Made if missing.
        llm: The model the weights belong to, for its modules' names.
        weights: Of any number of samples.
        sample: The one to write.
        base: Name or folder of the base model, as the adapter will name it.
        types: What to write; None: everything placed.

    Raises:
        ValueError: `m` is among the types (LoRA has no such branch), or a type was not placed.
    """
    layers = decoder_layers(llm)
    prefix = next(name for name, module in llm.named_modules() if module is layers)
    tensors, targets, rank = {}, [], 0
    for site, a, b in _factors(weights, sample, types):
        targets.append(f"{prefix}.{site.layer}.{site.module}")
        tensors[f"base_model.model.{targets[-1]}.lora_A.weight"] = a.T.contiguous()
        tensors[f"base_model.model.{targets[-1]}.lora_B.weight"] = b.T.contiguous()
        rank = a.shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": weights.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "target_modules": targets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    share(folder)


def save_gguf(
    file: Path, llm: nn.Module, weights: PerceptualWeights, sample: int, types: tuple[str, ...] | None = None
) -> None:
    """Write a LoRA adapter that llama.cpp loads beside the same model in GGUF (`llama-cli -m MODEL --lora FILE`).

    Layout, as llama.cpp's own converter writes it: `general.type` adapter, `adapter.type` lora, `adapter.lora.alpha`;
    per projection `blk.N.attn_q.weight.lora_a` [r, d_in] and `.lora_b` [d_out, r], fp32. For the Llama family the rows
    of q and k are in llama.cpp's order.

    Args:
        file: To write.
        llm, weights, sample, types: As for `save_adapter`.

    Raises:
        ValueError: an architecture that the package gguf does not know, or a type that cannot be written.
    """
    config = llm.config.get_text_config()
    name = _GGUF_NAMES.get(config.model_type, config.model_type)
    found = next((arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    if found is None:
        raise ValueError(f"llama.cpp knows no architecture {config.model_type!r}; format=peft writes PEFT's form alone")
    names = gguf.get_tensor_name_map(found, config.num_hidden_layers)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads} if name in _INTERLEAVED else {}
    writer = gguf.GGUFWriter(file, name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = 0
    for site, a, b in _factors(weights, sample, types):
        target = names.get_name(f"model.layers.{site.layer}.{site.module}")
        if target is None:
            raise ValueError(f"llama.cpp has no tensor for {site.module} of {config.model_type!r}")
        down, up = a.float().T.numpy(), b.float().T.numpy()
        if site.type in heads:
            up = _interleaved(up, heads[site.type])
        writer.add_tensor(f"{target}.weight.lora_a", np.ascontiguousarray(down))
        writer.add_tensor(f"{target}.weight.lora_b", np.ascontiguousarray(up))
        rank = a.shape[1]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, weights.scale * rank)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def exportable(weights: PerceptualWeights) -> tuple[str, ...]:
    """The placed types that a LoRA adapter can hold: all but `m`."""
    return tuple(t for t in weights.placement.types if t != "m")


def _factors(
    weights: PerceptualWeights, sample: int, types: tuple[str, ...] | None
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    placement = weights.placement
    types = placement.types if types is None else types
    for weight_type in types:
        if weight_type == "m":
            others = ",".join(t for t in types if t != "m")
            raise ValueError(f"type 'm' has no place in a LoRA adapter: {WHY_NOT_M}; types={others} leaves it out")
        if weight_type not in placement.types:
            raise ValueError(f"type {weight_type!r} is not placed; placed are {', '.join(placement.types)}")
    for site in (site for t in types for site in placement.of_type(t)):
        yield site, weights.a[site][sample].detach().cpu(), weights.b[site].detach().cpu()


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, n] from transformers' order (halves [2, d/2]) to llama.cpp's ([d/2, 2])."""
    count, columns = rows.shape
    return rows.reshape(heads, 2, count // heads // 2, columns).swapaxes(1, 2).reshape(count, columns)
