"""One sample's perceptual weights as a standard LoRA adapter, the file pair that PEFT and inference servers load."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from model.deploy.merging import WHY_NOT_M
from model.generator.placement import decoder_layers
from model.generator.weights import PerceptualWeights


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
    placement = weights.placement
    types = placement.types if types is None else types
    for weight_type in types:
        if weight_type == "m":
            others = ",".join(t for t in types if t != "m")
            raise ValueError(f"type 'm' has no place in a LoRA adapter: {WHY_NOT_M}; types={others} leaves it out")
        if weight_type not in placement.types:
            raise ValueError(f"type {weight_type!r} is not placed; placed are {', '.join(placement.types)}")
    layers = decoder_layers(llm)
    prefix = next(name for name, module in llm.named_modules() if module is layers)
    tensors, targets = {}, []
    for site in (site for t in types for site in placement.of_type(t)):
        targets.append(f"{prefix}.{site.layer}.{site.module}")
        a, b = weights.a[site][sample].detach(), weights.b[site].detach()
        tensors[f"base_model.model.{targets[-1]}.lora_A.weight"] = a.T.cpu().contiguous()
        tensors[f"base_model.model.{targets[-1]}.lora_B.weight"] = b.T.cpu().contiguous()
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
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
