"""The released VLoRA as its tensors and formulas say, written without our modules: the reference of import and export.

A checkpoint is a dictionary of tensors under the authors' names; `logits` computes with it through hooks on a plain
decoder.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS = 16


def config(
    types: str = "qkvom", separate: bool = True, every: int = 2, alpha: float | None = None, **sizes: int
) -> dict:
    """Their configuration fields, tiny."""
    return {
        "vlora_dim": 32, "vlora_depth": 2, "vlora_visual_dim": 24, "vlora_pos_num": 4, "vlora_llm_dim": 32,
        "vlora_llm_depth": 8, "vlora_rank": 4, "vlora_alpha": alpha, "vlora_type": types, "weights_sep": separate,
        "skip_layers": every, **sizes,
    }  # fmt: skip


def checkpoint(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of `mm_projector`, named and shaped as the authors' saver leaves them."""
    generator = torch.Generator().manual_seed(seed)
    g, hidden, rank = config["vlora_dim"], config["vlora_llm_dim"], config["vlora_rank"]
    groups, types = config["vlora_llm_depth"] // config["skip_layers"], len(config["vlora_type"])
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config["vlora_pos_num"], g),
        "Bs": (1, types * groups, hidden * rank),
        "visual_proj.weight": (g, config["vlora_visual_dim"]),
        "visual_proj.bias": (g,),
    }
    separate = config["weights_sep"]
    for stack in [f"gen.{n}" for n in range(types)] if separate else ["gen"]:
        shapes[f"{stack}.queries"] = (1, groups if separate else types * groups, g)
        for block in range(config["vlora_depth"]):
            at = f"{stack}.decoders.{block}"
            for attention in ("self_attn", "multihead_attn"):
                shapes |= {
                    f"{at}.{attention}.in_proj_weight": (3 * g, g),
                    f"{at}.{attention}.in_proj_bias": (3 * g,),
                    f"{at}.{attention}.out_proj.weight": (g, g),
                    f"{at}.{attention}.out_proj.bias": (g,),
                }
            shapes |= {f"{at}.linear1.weight": (4 * g, g), f"{at}.linear1.bias": (4 * g,)}
            shapes |= {f"{at}.linear2.weight": (g, 4 * g), f"{at}.linear2.bias": (g,)}
            for norm in ("norm1", "norm2", "norm3"):
                shapes |= {f"{at}.{norm}.weight": (g,), f"{at}.{norm}.bias": (g,)}
        shapes |= {f"{stack}.norm.weight": (g,), f"{stack}.norm.bias": (g,)}
        shapes |= {f"{stack}.weights_head.weight": (hidden * rank, g), f"{stack}.weights_head.bias": (hidden * rank,)}
    return {
        f"model.mm_projector.{name}": torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()
    }


def _attend(t: dict[str, Tensor], at: str, query: Tensor, value: Tensor) -> Tensor:
    q, k, v = (
        F.linear(x, w, b)
        for x, w, b in zip(
            (query, value, value), t[f"{at}.in_proj_weight"].chunk(3), t[f"{at}.in_proj_bias"].chunk(3), strict=True
        )
    )

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    scores = heads(q) @ heads(k).mT / math.sqrt(q.shape[-1] // HEADS)
    mixed = (scores.softmax(-1) @ heads(v)).transpose(1, 2).flatten(-2)
    return F.linear(mixed, t[f"{at}.out_proj.weight"], t[f"{at}.out_proj.bias"])


def weights(
    tensors: dict[str, Tensor], c: dict[str, Any], features: Tensor, seen: Tensor
) -> dict[tuple[int, str], Any]:
    """(A [B, D, r], scaled B [D, r]) by layer and type; A is zero for samples without an image (`seen` 0)."""
    t = {name.removeprefix("model.mm_projector."): tensor for name, tensor in tensors.items()}

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{at}.weight"], t[f"{at}.bias"], 1e-5)

    value = F.linear(features, t["visual_proj.weight"], t["visual_proj.bias"]) + t["pos_embed"]
    rows = []
    for stack in [f"gen.{n}" for n in range(len(c["vlora_type"]))] if c["weights_sep"] else ["gen"]:
        x = t[f"{stack}.queries"].repeat(len(features), 1, 1)
        for block in range(c["vlora_depth"]):
            at = f"{stack}.decoders.{block}"
            y = norm(x, f"{at}.norm1")
            x = x + _attend(t, f"{at}.self_attn", y, y)
            x = x + _attend(t, f"{at}.multihead_attn", norm(x, f"{at}.norm2"), value)
            y = F.gelu(F.linear(norm(x, f"{at}.norm3"), t[f"{at}.linear1.weight"], t[f"{at}.linear1.bias"]))
            x = x + F.linear(y, t[f"{at}.linear2.weight"], t[f"{at}.linear2.bias"])
        x = norm(x, f"{stack}.norm")
        rows.append(F.linear(x, t[f"{stack}.weights_head.weight"], t[f"{stack}.weights_head.bias"]))
    groups, rank = c["vlora_llm_depth"] // c["skip_layers"], c["vlora_rank"]
    shape = (len(c["vlora_type"]), groups, c["vlora_llm_dim"], rank)
    a = torch.cat(rows, 1).reshape(len(features), *shape) * seen.view(-1, 1, 1, 1, 1)
    b = t["Bs"].reshape(shape) * ((c["vlora_alpha"] or rank) / rank)
    return {
        (layer, kind): (a[:, n, layer // c["skip_layers"]], b[n, layer // c["skip_layers"]])
        for layer in range(c["vlora_llm_depth"]) if (layer + 1) % c["skip_layers"] == 0
        for n, kind in enumerate(c["vlora_type"])
    }  # fmt: skip


def logits(llm: torch.nn.Module, deltas: dict[tuple[int, str], Any], **inputs: Tensor) -> Tensor:
    """Of a plain decoder whose projections get the deltas of each row by hooks."""
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "m": "mlp",
    }
    with ExitStack() as stack:
        for (layer, kind), (a, b) in deltas.items():

            def add(module: torch.nn.Module, args: tuple, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return out + args[0] @ a @ b.T

            module = llm.model.layers[layer].get_submodule(names[kind])
            handle = module.register_forward_hook(add)
            stack.callback(handle.remove)
        return llm(**inputs).logits
