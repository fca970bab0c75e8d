"""What a causal language model does around its head: found out by running its own forward with stand-ins.

Families divide logits (Granite), multiply them (Cohere, Falcon-H1), cap them (Gemma 2) or scale what the head reads
(MiniCPM 3). Names of settings differ and a new family brings new ones, so none is looked for. The decoder and the head
are replaced for one forward by functions that return known numbers: nothing is computed, and weights may be on the
meta device or partitioned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from model.loading import ModelError


class HeadTransform(NamedTuple):
    """logits = cap(scale * head(input_scale * hidden)), where cap(z) = softcap * tanh(z / softcap) or z."""

    input_scale: float = 1.0
    scale: float = 1.0
    softcap: float | None = None


def head_transform(llm: PreTrainedModel) -> HeadTransform:
    """The transform of `llm`, which is not changed.

    Raises:
        ModelError: its forward does anything else between the decoder and the logits.
    """
    with torch.device("cpu"):  # also where a model is built on the meta device
        return _found(llm)


def _found(llm: PreTrainedModel) -> HeadTransform:
    head = llm.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.in_features, generator=generator)
    # From nearly 0, where a cap is a line, to where it is flat.
    probe = torch.cat([torch.tensor([0.0, 1e-3, -1e-3, 1e6, -1e6]), torch.linspace(-100, 100, 51)])
    logits = probe.repeat(-(-head.out_features // len(probe)))[: head.out_features].expand(1, 2, -1)
    if head.out_features < 4:
        raise ModelError(f"{_name(llm)}: a head of {head.out_features} outputs is no vocabulary")
    read, out = _run(llm, head, hidden, logits)
    scales = (read / hidden).flatten()
    input_scale, f = float(scales[0]), out[0, 0]
    scale, flat = float(f[1] / logits[0, 0, 1]), float(f[3])
    softcap = None if abs(flat - 1e6 * scale) < 1e-3 * abs(flat) else flat
    found = HeadTransform(_snapped(input_scale), _snapped(scale), softcap)
    scaled = logits * found.scale
    expected = scaled if found.softcap is None else found.softcap * torch.tanh(scaled / found.softcap)
    if not (torch.allclose(read, hidden * found.input_scale, rtol=1e-4) and torch.allclose(out, expected, rtol=1e-3)):
        raise ModelError(
            f"{_name(llm)} computes logits in a way that is not known here (neither a scale nor a soft cap), so "
            "its loss would be wrong; choose another LLM"
        )
    return found


class _Decoded(BaseModelOutput):
    """A decoder's output; whatever else a family looks for in it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _run(llm: PreTrainedModel, head: nn.Module, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is given and what the model returns, in fp32, where decoder and head return these tensors."""
    read: list[Tensor] = []

    def decode(*_: Any, **__: Any) -> _Decoded:
        return _Decoded(last_hidden_state=hidden)

    def project(x: Tensor) -> Tensor:
        read.append(x)
        return logits

    decoder = llm.get_decoder()
    # Forwards found on the instance come before that of the class, hooks or not.
    before = [module.__dict__.get("forward") for module in (decoder, head)]
    decoder.forward, head.forward = decode, project
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=llm.device)
        with torch.no_grad():
            out = llm(input_ids=ids, use_cache=False).logits
    except Exception as error:  # whatever a forward that we do not know may raise
        raise ModelError(f"{_name(llm)}: its forward cannot be followed to the logits ({error!r})") from error
    finally:
        for module, forward in zip((decoder, head), before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    if len(read) != 1 or read[0].shape != hidden.shape or out.shape != logits.shape:
        raise ModelError(f"{_name(llm)}: its head is no plain projection of the decoder's output")
    return read[0].float(), out.float()


def _snapped(value: float) -> float:
    """1 where the probe's own rounding is all that differs from it."""
    return 1.0 if abs(value - 1) < 1e-6 else value


def _name(llm: nn.Module) -> str:
    return type(llm).__name__
