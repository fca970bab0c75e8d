"""Low-rank adapters of a Hugging Face decoder, trained in place of its weights, by the library peft.

An adapter wraps a projection into which perceptual deltas may have been injected before: W x + delta + (alpha / rank)
B A x. So projections that share their input stay one op. B is zero at the start. Folded into the weights at the end,
the decoder is a plain one again.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import share
from model.config import LoRAConfig, parse_types
from model.generator.placement import decoder_layers, find_projection

_NAME = "default"  # of the one set of adapters, as peft itself calls it


def add_adapters(llm: nn.Module, config: LoRAConfig) -> None:
    """Adapt the projections of the decoder layers whose weights require a gradient; all else in `llm` is frozen.

    Adapters have the dtype of their projection, and are made on its device.

    Raises:
        ValueError: no such projection, a type that this decoder lacks, or a rank above a projection's width.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = [(name, linear) for name, linear in _projections(llm, config) if linear.weight.requires_grad]
    if not chosen:
        raise ValueError(
            "stage.train.llm=lora: nothing to adapt, stage.freeze or freeze_lower keeps all that stage.lora.types names"
        )
    for name, linear in chosen:
        if config.rank > min(linear.in_features, linear.out_features):
            raise ValueError(
                f"stage.lora.rank={config.rank} is above the width of {name} ({linear.in_features} -> "
                f"{linear.out_features}); a larger rank only adds parameters"
            )
    llm.requires_grad_(False)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=[name for name, _ in chosen],
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(settings, llm, _NAME, low_cpu_mem_usage=chosen[0][1].weight.is_meta)


def is_adapted(llm: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return hasattr(llm, "peft_config")


def merge(llm: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The decoder's own tensors by its own names, with the adapters folded in: computed in fp32, rounded once.

    Args:
        llm: With adapters.
        tensors: Whole tensors by their names in `llm`; those of the adapters best in fp32.
        dtype: Of the parameters returned; buffers stay as they are.
    """
    buffers = {name for name, _ in llm.named_buffers()}
    merged = {name: value for name, value in tensors.items() if ".lora_" not in name}
    for name, scale in _adapted(llm):
        down, up = (tensors[f"{name}.{factor}.{_NAME}.weight"].float() for factor in ("lora_A", "lora_B"))
        weight = f"{name}.base_layer.weight"
        merged[weight] = merged[weight].float() + scale * (up @ down)
    return {
        name.replace(".base_layer.", "."): value if name in buffers else value.to(dtype)
        for name, value in merged.items()
    }


def save_adapters(llm: nn.Module, tensors: dict[str, Tensor], base: str, folder: Path) -> None:
    """Write the adapters as peft reads them: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        llm: With adapters.
        tensors: As in `merge`; written in their own dtype.
        base: Name or folder of the model that they belong to.
        folder: Made if missing.
    """
    settings = llm.peft_config[_NAME].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    # What peft found when it adapted the model: names, as a set.
    settings["target_modules"] = sorted(name for name, _ in _adapted(llm))
    found = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value
        for name, value in tensors.items()
        if ".lora_" in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, default=sorted) + "\n", encoding="utf-8")
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    share(folder)


def _projections(llm: nn.Module, config: LoRAConfig) -> list[tuple[str, nn.Linear]]:
    """The linear layers to adapt, by their names in `llm`."""
    layers = decoder_layers(llm)
    prefix = next(name for name, module in llm.named_modules() if module is layers)
    types = None if config.types is None else parse_types(config.types, "stage.lora.types")
    found: dict[str, nn.Linear] = {}
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        if types is None:
            names: list[str | None] = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        else:
            names = [find_projection(modules, weight_type) for weight_type in types]
        found |= {f"{prefix}.{index}.{name}": modules[name] for name in names if name is not None}
    if not found:
        raise ValueError(f"stage.lora.types={config.types}: {type(llm).__name__} has no such projection")
    return list(found.items())


def _adapted(llm: nn.Module) -> list[tuple[str, float]]:
    """Name and scale, alpha / rank, of every adapted projection."""
    from peft.tuners.lora import LoraLayer

    return [(name, module.scaling[_NAME]) for name, module in llm.named_modules() if isinstance(module, LoraLayer)]
