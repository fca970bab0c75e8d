"""Takes the padding out of a batch: its text rows end to end, each seeing only itself.

The decoder gets restarted positions and no attention mask; from these transformers works out which tokens belong
together, for SDPA and eager attention as a block-diagonal causal mask (sliding windows included), for FlashAttention-2
as sequence lengths. The perceptual weights follow through `Rows.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.ops import NO_SAMPLE, Rows


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
        """
        kept = [torch.nonzero(row).flatten() for row in mask]
        packed: list[list[int]] = [[]]
        used = 0
        for number, positions in enumerate(kept):
            if tokens is not None and packed[-1] and used + len(positions) > tokens:
                packed.append([])
                used = 0
            if len(positions):
                packed[-1].append(number)
                used += len(positions)
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
