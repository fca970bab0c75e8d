"""Takes the padding out of a batch: its text rows end to end, each seeing only itself.

The decoder gets restarted positions and no attention mask; from these transformers works out which tokens belong
together, for SDPA and eager attention as a block-diagonal causal mask (sliding windows included), for FlashAttention-2
as sequence lengths. A decoder that does not tell transformers its positions (OPT, XGLM) is given the mask itself. The
perceptual weights follow through `Rows.packed`.
"""

from __future__ import annotations

import ast
import bisect
import functools
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from model.generator.placement import decoder_layers
from model.loading import ModelError
from model.ops import NO_SAMPLE, Rows

_SEPARABLE = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of `layer_types` for which transformers keeps packed texts apart."""


@dataclass(frozen=True)
class Packing:
    """Where every token of a padded batch stands in the packed one.

    R text rows of L positions become P packed rows of T; a *segment* is what is left of one text row.

    Attributes:
        source: int64 [P, T], flat position (of R * L) of each packed token; 0 at the filling of a short row.
        target: int64 [R, L], flat position (of P * T) of each text token; 0 at padding.
        position_ids: int64 [P, T], from 0 in each segment; all 0 in filling, so that it belongs to nothing.
        offsets: Start of every segment (filling tokens count as one more per packed row) and, last, P * T.
        row: Text row of each segment, -1 for filling.
    """

    source: Tensor
    target: Tensor
    position_ids: Tensor
    offsets: tuple[int, ...]
    row: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor, tokens: int | None) -> Packing:
        """Lay out the rows of `mask` in their order.

        Args:
            mask: [R, L] on the host, not 0 where a token is; padding may stand anywhere.
            tokens: A packed row holds at most so many tokens, more only where one text row has more. Bounds the
                square of attention by mask. None: everything in one row.

        Of all layouts with the fewest rows it takes one whose longest row is shortest, which fills least.
        """
        kept = [torch.nonzero(row).flatten() for row in mask]
        lengths = [len(positions) for positions in kept]
        packed = _filled(lengths, None if tokens is None else _even(lengths, tokens))
        width = max(1, *(sum(len(kept[number]) for number in rows) for rows in packed))
        source = torch.zeros(len(packed), width, dtype=torch.int64)
        position_ids = torch.zeros(len(packed), width, dtype=torch.int64)
        target = torch.zeros(mask.shape, dtype=torch.int64)
        offsets, row = [], []
        for index, rows in enumerate(packed):
            start = 0
            for number in rows:
                positions, end = kept[number], start + len(kept[number])
                source[index, start:end] = number * mask.shape[1] + positions
                position_ids[index, start:end] = torch.arange(end - start)
                target[number, positions] = index * width + torch.arange(start, end)
                offsets.append(index * width + start)
                row.append(number)
                start = end
            if start < width:
                offsets.append(index * width + start)
                row.append(-1)
        return cls(source, target, position_ids, (*offsets, source.numel()), tuple(row))

    def to(self, device: torch.device) -> Packing:
        """Copy to `device`."""
        source, target, position_ids = (
            t.to(device, non_blocking=True) for t in (self.source, self.target, self.position_ids)
        )
        return replace(self, source=source, target=target, position_ids=position_ids)

    def rows(self, rows: Rows) -> Rows:
        """The sample of each segment, from that of each text row."""
        sample: Sequence[int] = [NO_SAMPLE if r < 0 else rows.sample[r] for r in self.row]
        return Rows.packed(self.offsets, sample, rows.n_samples)

    def flash_keywords(self) -> dict[str, Tensor | int]:
        """What FlashAttention-2 is told of a single packed row.

        transformers would read it off the positions again in every layer, waiting for the GPU each time.
        """
        starts = torch.tensor(self.offsets, dtype=torch.int32)
        longest, starts = int(starts.diff().max()), starts.to(self.source.device, non_blocking=True)
        return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}

    def pack(self, x: Tensor) -> Tensor:
        """[R, L, ...] -> [P, T, ...]."""
        return x.flatten(0, 1)[self.source]


def _filled(lengths: Sequence[int], bound: int | None) -> list[list[int]]:
    """Numbers of the texts in each row, one row after another filled up to `bound`; empty texts stand in none."""
    rows: list[list[int]] = [[]]
    used = 0
    for number, length in enumerate(lengths):
        if bound is not None and rows[-1] and used + length > bound:
            rows.append([])
            used = 0
        if length:
            rows[-1].append(number)
            used += length
    return rows


def _even(lengths: Sequence[int], most: int) -> int:
    """The smallest bound under which as few rows are enough as under `most`."""
    fewest = len(_filled(lengths, most))
    return bisect.bisect_left(range(most), True, key=lambda bound: len(_filled(lengths, bound)) <= fewest)


def check_packing(llm: PreTrainedModel) -> None:
    """Check that texts which stand in one row stay apart in this decoder.

    Raises:
        ModelError: layers carry something along the row besides attention (convolutions, recurrent states), or
            attention is masked in a way that cannot be given from outside.
    """
    config, name = llm.config.get_text_config(), type(llm).__name__
    cure = "one text would flow into the next; set llm.pack_tokens=null"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _SEPARABLE)
    mixing = sorted({type(m).__name__ for layer in decoder_layers(llm) for m in layer.modules() if _mixes(m)})
    if other or mixing:
        raise ModelError(f"llm.pack_tokens: {name} has layers of kind {', '.join(other or mixing)}: {cure}")
    decoder: Any = type(llm.get_decoder())
    if not (_tells_positions(decoder) or _takes_masks(decoder)) and getattr(config, "layer_types", None):
        raise ModelError(f"llm.pack_tokens: {name} masks its kinds of layers without looking at positions: {cure}")


def packed_mask(llm: PreTrainedModel, position_ids: Tensor) -> Any:
    """The attention mask of packed rows, [P, 1, T, T] (by kind of layer), where a decoder would not make it itself.

    None for all decoders that tell transformers their positions.
    """
    decoder: Any = type(llm.get_decoder())
    if _tells_positions(decoder) or position_ids.is_meta:
        return None
    like = torch.empty(*position_ids.shape, 1, dtype=llm.dtype, device=position_ids.device)
    return create_masks_for_generate(llm.config.get_text_config(), like, None, None, position_ids)


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d)


@functools.cache
def _tells_positions(decoder: Any) -> bool:
    """Whether a decoder's forward passes positions to the function that makes its mask, read off its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(decoder.forward))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_mask(node.func)]
    shared = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]  # of keywords, for several masks
    keys = {key.value for node in shared for key in node.keys if isinstance(key, ast.Constant)}
    names = {keyword.arg for call in calls for keyword in call.keywords}
    return "position_ids" in names or (None in names and "position_ids" in keys)


@functools.cache
def _takes_masks(decoder: Any) -> bool:
    """Whether a decoder's forward accepts ready masks, one per kind of layer, read off its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(decoder.forward))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return any(
        call.func.id == "isinstance" and isinstance(call.args[1], ast.Name) and call.args[1].id == "dict"
        for call in calls
        if isinstance(call.func, ast.Name)
    )


def _is_mask(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    return name.startswith("create_") and "mask" in name or name == "mask_function"
