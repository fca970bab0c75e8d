"""Gated cross-attention in a decoder: some of its layers first look at the image's features, which stand in no input.

As Flamingo has it: in front of a decoder layer, hidden states attend to the features of their own sample's images, and
the result is added times tanh of a gate that starts at zero, so that an untrained model is the LLM itself. The features
travel as a keyword of each decoder layer's forward, which recomputation sees twice. The blocks belong to the connector:
they are trained, exported and partitioned with it, and a layer only calls its own.

Shapes: R text rows of L tokens, I images, P patches, W feature width, M images of a row at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder.packing import Packing
from model.decoder.swap import swap
from model.generator.placement import decoder_layers


@dataclass(frozen=True)
class VisualContext:
    """What the blocks of all layers look at.

    Attributes:
        features: [I, P, W].
        images: int64 [R, M], the images of each text row; anything where there is none.
        seen: bool [R, M], whether there is one.
        packing: Where the tokens of the rows stand in the decoder's input; None: as they are.
        kept: Keys and values by layer, kept through a generation, whose steps need them again.
    """

    features: Tensor
    images: Tensor | None = None
    seen: Tensor | None = None
    packing: Packing | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of_row(cls, features: Tensor) -> VisualContext:
        """Of one text row, which is about all of the images [I, P, W]."""
        return cls(features).for_rows([list(range(len(features)))])

    @classmethod
    def batch(cls, each: Sequence[VisualContext | None]) -> VisualContext:
        """For as many text rows, each with the images of one row's context or none; at least one has some."""
        given = [context for context in each if context is not None]
        number = iter(range(sum(len(context.features) for context in given)))
        rows = [[] if context is None else [next(number) for _ in context.features] for context in each]
        most = max(map(len, rows))
        features = torch.cat([context.features for context in given])
        return cls(features).for_rows([row + [-1] * (most - len(row)) for row in rows])

    def __add__(self, other: VisualContext) -> VisualContext:
        """One row about the images of both."""
        return self.of_row(torch.cat([self.features, other.features]))

    @property
    def nbytes(self) -> int:
        """Of the features."""
        return self.features.nbytes

    def for_rows(self, images: list[list[int]], packing: Packing | None = None) -> VisualContext:
        """The same features for text rows.

        Args:
            images: Numbers of the images of every row, filled up with -1 to one length.
            packing: Of the rows.
        """
        index = torch.tensor(images, device=self.features.device)
        return replace(self, images=index.clamp_min(0), seen=index >= 0, packing=packing)


class GatedCrossAttention(nn.Module):
    """One layer's block: x + tanh(gate) * attention(norm(x), features).

    Args:
        index: Number of the decoder layer.
        hidden: Width of the decoder.
        width: Width W of the features.
        heads: Attention heads, as many as the decoder has.
    """

    def __init__(self, index: int, hidden: int, width: int, heads: int) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"connector=crossattn: {heads} heads do not divide the LLM's width {hidden}")
        self.index, self.heads = index, heads
        self.norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, context: VisualContext) -> Tensor:
        """hidden [R, L, D], or packed [P, T, D] -> the same shape."""
        assert context.images is not None and context.seen is not None
        packing = context.packing
        rows = hidden if packing is None else hidden.flatten(0, 1)[packing.target]
        query = self._heads(self.query(self.norm(rows)))
        key, value = self._keys(context, len(rows)).chunk(2, dim=-1)
        beams = len(rows) // len(context.seen)  # of one row, which stand together
        seen = context.seen.repeat_interleave(beams, 0)
        # A row without an image looks at whatever stands there, and the result is taken times zero.
        mask = (seen | ~seen.any(1, keepdim=True)).repeat_interleave(context.features.shape[1], 1)
        found = nn.functional.scaled_dot_product_attention(
            query, self._heads(key), self._heads(value), attn_mask=mask[:, None, None, :]
        )
        found = self.out(found.transpose(1, 2).flatten(2)) * seen.any(1).to(hidden.dtype)[:, None, None]
        if packing is not None:
            found = found.flatten(0, 1)[packing.source]
        return hidden + torch.tanh(self.gate) * found

    def _keys(self, context: VisualContext, rows: int) -> Tensor:
        """Keys and values of every row's images, [R, M * P, 2 D]."""
        assert context.images is not None
        if (kept := context.kept.get(self.index)) is not None and len(kept) == rows:
            return kept
        images = context.images.repeat_interleave(rows // len(context.images), 0)
        made = self.key_value(context.features)[images].flatten(1, 2)
        if not torch.is_grad_enabled():
            context.kept[self.index] = made
        return made

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _LookingLayer(nn.Module):
    """Mixin in front of a decoder layer's class."""

    def forward(self, hidden_states: Tensor, *args: Any, visual_context: VisualContext | None = None, **kw: Any) -> Any:
        context = visual_context if visual_context is not None else self._looks_at["pinned"]
        if context is not None and self._block:
            hidden_states = self._block[0](hidden_states, context)
        return super().forward(hidden_states, *args, **kw)


def attach_blocks(llm: nn.Module, blocks: Sequence[GatedCrossAttention]) -> None:
    """Make `llm` accept `visual_context=` in its forward. Without it, it computes exactly what it did before.

    Raises:
        ValueError: `llm` has such blocks already.
    """
    by_layer = {block.index: block for block in blocks}
    for index, layer in enumerate(decoder_layers(llm)):
        if isinstance(layer, _LookingLayer):
            raise ValueError("this model has cross-attention blocks already")
        # In a tuple, so that nn.Module does not count the block as the layer's.
        swap(layer, _LookingLayer, _block=(by_layer[index],) if index in by_layer else (), _looks_at={"pinned": None})


@contextmanager
def looking_at(llm: nn.Module, context: VisualContext | None) -> Iterator[None]:
    """Use `context` in every forward inside the block: for `generate`, which refuses keywords it does not know."""
    states = [layer._looks_at for layer in decoder_layers(llm) if isinstance(layer, _LookingLayer)]
    for state in states:
        state["pinned"] = context
    try:
        yield
    finally:
        for state in states:
            state["pinned"] = None
