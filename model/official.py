"""The authors' released VLoRA checkpoints (FeipengMa6/VLoRA): their tensors under our names, and back bit for bit.

Theirs, below `model.mm_projector.`, with T types, G layers, N blocks, width g, hidden size D, rank r:

    pos_embed [1, P, g]   visual_proj.*   Bs [1, T*G, D*r]
    gen.T.queries [1, G, g]   gen.T.decoders.N.*   gen.T.norm.*   gen.T.weights_head.*     one stack per type
    gen.queries [1, T*G, g]   gen.decoders.N.* ...                                         weights_sep = false

Their code knows one width, so it takes no grouped-query attention. Nowhere stored: that attention has 16 heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import GeneratorConfig, parse_types
from model.pretrained import ModelError, load_bin, weight_files

PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower."
HEADS = 16
_FIELDS = ("vlora_dim", "vlora_depth", "vlora_llm_dim", "vlora_llm_depth", "vlora_rank", "vlora_type", "skip_layers")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and all tensors of a `llava_vlora` folder, or of one with `mm_projector.bin` alone.

    Raises:
        ModelError: files missing, damaged, or holding anything but tensors; not a VLoRA checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json: rank, types and layers of a released checkpoint stand only there; copy it "
            "beside mm_projector.bin"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if lost := [name for name in _FIELDS if name not in config]:
        raise ModelError(f"{folder / 'config.json'} has no {', '.join(lost)}: it is not that of a VLoRA checkpoint")
    if (alone := folder / "mm_projector.bin").is_file():
        return config, load_bin("mm_projector", alone)
    tensors: dict[str, Tensor] = {}
    for name in weight_files("checkpoint", folder):
        if name.endswith(".bin"):
            tensors |= load_bin("checkpoint", folder / name)
        else:
            from safetensors.torch import load_file

            tensors |= load_file(folder / name)
    return config, tensors


def generator_config(config: Mapping[str, Any]) -> GeneratorConfig:
    """Our generator's configuration from theirs."""
    return GeneratorConfig(
        num_blocks=config["vlora_depth"],
        width=config["vlora_dim"],
        num_heads=HEADS,
        rank=config["vlora_rank"],
        alpha=config.get("vlora_alpha"),
        types=config["vlora_type"],
        every=config["skip_layers"],
        shared=not config.get("weights_sep", True),
        image_norm=False,
        init="paper",
    )


def official_config(
    generator: GeneratorConfig, layers: int, hidden: int, patches: int, features: int
) -> dict[str, Any]:
    """Their configuration fields from ours.

    Raises:
        ModelError: a generator that their code cannot express.
    """
    types = parse_types(generator.types)
    reasons = {
        "generator.init is not paper (their keys are not normalised)": generator.init != "paper",
        "generator.image_norm is on": generator.image_norm,
        "generator.layers is given (they place every n-th)": generator.layers is not None or not generator.every,
        "generator.above leaves layers out": generator.above > 0,
        "the layers do not divide by generator.every": bool(generator.every and layers % generator.every),
        f"generator.types {','.join(types)} are not among q,k,v,o,m": not set(types) <= set("qkvom"),
        f"generator.num_heads is not {HEADS}": generator.num_heads != HEADS,
        "generator.ffn_ratio is not 4": generator.ffn_ratio != 4,
    }
    if why := [text for text, holds in reasons.items() if holds]:
        raise ModelError(f"the released code cannot hold this generator: {'; '.join(why)}")
    return {
        "vlora_dim": generator.width,
        "vlora_depth": generator.num_blocks,
        "vlora_visual_dim": features,
        "vlora_pos_num": patches,
        "vlora_llm_dim": hidden,
        "vlora_llm_depth": layers,
        "vlora_rank": generator.rank,
        "vlora_alpha": generator.rank if generator.alpha is None else generator.alpha,
        "vlora_type": "".join(types),
        "weights_sep": not generator.shared,
        "skip_layers": generator.every,
    }


def import_connector(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """State of our `VLoRAConnector` from their tensors; names may or may not carry `model.mm_projector.`.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape than `config` says.
    """
    theirs = {name.split("mm_projector.", 1)[-1]: tensor for name, tensor in tensors.items()}
    types, hidden, rank = config["vlora_type"], config["vlora_llm_dim"], config["vlora_rank"]
    groups = config["vlora_llm_depth"] // config["skip_layers"]
    out: dict[str, Tensor] = {}
    for name in _names(config):
        if name not in theirs:
            raise ModelError(f"the checkpoint lacks {PROJECTOR}{name}, which its config.json asks for")
        tensor = theirs.pop(name)
        if name == "Bs":
            expected = (1, len(types) * groups, hidden * rank)
            if tuple(tensor.shape) != expected:
                raise ModelError(f"{PROJECTOR}Bs has shape {tuple(tensor.shape)}, config.json means {expected}")
            factors = tensor.view(len(types), groups, hidden, rank).transpose(2, 3)
            out |= {f"generator.output_factors.{t}.weight": factors[n].contiguous() for n, t in enumerate(types)}
        elif name.endswith(("queries", "pos_embed")):
            out[_ours(name, hidden)] = tensor[0]
        else:
            out[_ours(name, hidden)] = tensor
    if theirs:
        raise ModelError(f"the checkpoint holds {PROJECTOR}{min(theirs)}, which its config.json does not account for")
    return out


def export_connector(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their tensors, in their order and under their full names, from the state of our `VLoRAConnector`."""
    types, hidden = config["vlora_type"], config["vlora_llm_dim"]
    out: dict[str, Tensor] = {}
    for name in _names(config):
        if name == "Bs":
            import torch

            factors = torch.stack([state[f"generator.output_factors.{t}.weight"] for t in types])
            out[PROJECTOR + name] = factors.transpose(2, 3).reshape(1, factors.shape[0] * factors.shape[1], -1)
        elif name.endswith(("queries", "pos_embed")):
            out[PROJECTOR + name] = state[_ours(name, hidden)][None]
        else:
            out[PROJECTOR + name] = state[_ours(name, hidden)]
    return out


def _names(config: Mapping[str, Any]) -> Iterable[str]:
    """Names of their tensors, in the order of their `named_parameters`."""
    yield from ("pos_embed", "Bs", "visual_proj.weight", "visual_proj.bias")
    separate = config.get("weights_sep", True)
    for stack in [f"gen.{n}." for n in range(len(config["vlora_type"]))] if separate else ["gen."]:
        yield f"{stack}queries"
        for block in range(config["vlora_depth"]):
            for attention in ("self_attn", "multihead_attn"):
                yield from (f"{stack}decoders.{block}.{attention}.{end}" for end in ("in_proj_weight", "in_proj_bias"))
                yield from (f"{stack}decoders.{block}.{attention}.out_proj.{end}" for end in ("weight", "bias"))
            for layer in ("linear1", "linear2", "norm1", "norm2", "norm3"):
                yield from (f"{stack}decoders.{block}.{layer}.{end}" for end in ("weight", "bias"))
        yield from (f"{stack}{layer}.{end}" for layer in ("norm", "weights_head") for end in ("weight", "bias"))


def _ours(name: str, hidden: int) -> str:
    """Our name of a tensor of theirs; `hidden` names the one head that their single width needs."""
    if not name.startswith("gen."):
        return f"generator.keys.{name}"
    name = re.sub(r"^gen\.(?!\d)", "gen.0.", name).replace("gen.", "generator.stacks.", 1)
    return name.replace(".decoders.", ".blocks.").replace(".weights_head.", f".heads.{hidden}.")


def split_checkpoint(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Connector, language model and vision tower of a full checkpoint, the last two under transformers' names.

    `rotary_emb.inv_freq`, which old versions stored, is left out.
    """

    def below(prefix: str, keep: Callable[[str], bool]) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if keep(name)}

    connector = below("", lambda name: "mm_projector." in name)
    tower = below(TOWER, lambda name: name.startswith(TOWER) and not name.endswith("position_ids"))
    rest = {name for name in tensors if "mm_projector." not in name and not name.startswith("model.vision_tower.")}
    language = below("", lambda name: name in rest and not name.endswith("rotary_emb.inv_freq"))
    return connector, language, tower
