"""Which sample every token belongs to: worked out once per batch, used by every projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

NO_SAMPLE = -1
"""Sample id of a row without an image: it gets no update, at no cost."""


@dataclass(frozen=True)
class Segments:
    """Runs of tokens with one sample each, laid out for kernels; N segments, S samples.

    Attributes:
        offsets: int32 [N + 1]; segment i holds tokens `offsets[i]:offsets[i + 1]`.
        sample: int32 [N], the sample of each segment or `NO_SAMPLE`.
        order: int32 [M], the M segments that have a sample, sorted by sample.
        first: int32 [S + 1]; the segments of sample s are `order[first[s]:first[s + 1]]`.
        per_sample: N > 0 when token t belongs to sample `t // n` throughout (a reshape replaces all lookups), else 0.
        max_len: Tokens of the longest segment.
        n_tokens: T, the tokens of all segments.
    """

    offsets: Tensor
    sample: Tensor
    order: Tensor
    first: Tensor
    per_sample: int
    max_len: int
    n_tokens: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor], per_sample: int, max_len: int, n_tokens: int) -> Segments:
        """From the four index tensors (`tensors()`) and the sizes, as the ops hand them on."""
        offsets, sample, order, first = tensors
        return cls(offsets, sample, order, first, per_sample, max_len, n_tokens)

    @property
    def n_samples(self) -> int:
        """S."""
        return self.first.shape[0] - 1

    def tensors(self) -> list[Tensor]:
        """The four index tensors, as the ops take them."""
        return [self.offsets, self.sample, self.order, self.first]


@dataclass(frozen=True)
class Rows:
    """The sample of each row of a padded batch, or of each segment of a packed one.

    Build it once per batch (`Rows.padded` or `Rows.packed`) and hand it to every projection; the index tensors are
    cached per (row length, device), so that generation with its growing rows pays for them once.

    Attributes:
        sample: Sample id of each row or segment; `NO_SAMPLE` for none.
        n_samples: S, the number of samples that `a` will hold.
        offsets: Token offsets of the packed segments, None for padded rows.
    """

    sample: tuple[int, ...]
    n_samples: int
    offsets: tuple[int, ...] | None = None
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bad = [s for s in self.sample if not NO_SAMPLE <= s < self.n_samples]
        if bad:
            raise ValueError(f"rows name sample {bad[0]}, but there are {self.n_samples} samples")
        if self.offsets is not None:
            if len(self.offsets) != len(self.sample) + 1:
                raise ValueError(
                    f"{len(self.sample)} segments need {len(self.sample) + 1} offsets, got {len(self.offsets)}"
                )
            if self.offsets[0] != 0 or any(e < s for s, e in zip(self.offsets, self.offsets[1:], strict=False)):
                raise ValueError("segment offsets must start at 0 and never decrease")

    @classmethod
    def padded(cls, row_to_sample: Tensor | Sequence[int], n_samples: int) -> Rows:
        """Rows of equal length. `row_to_sample`: int [R]; reading a CUDA tensor synchronises once."""
        return cls(tuple(_ints(row_to_sample)), n_samples)

    @classmethod
    def packed(cls, offsets: Tensor | Sequence[int], segment_to_sample: Tensor | Sequence[int], n_samples: int) -> Rows:
        """Segments of any length, end to end. `offsets`: int [N + 1] from 0; `segment_to_sample`: int [N]."""
        return cls(tuple(_ints(segment_to_sample)), n_samples, tuple(_ints(offsets)))

    def segments(self, length: int, device: torch.device) -> Segments:
        """The segments on `device`; `length` is the row length (ignored when packed)."""
        key = (length if self.offsets is None else -1, device)
        if key not in self._cache:
            self._cache[key] = self._build(length, device)
        return self._cache[key]

    def _build(self, length: int, device: torch.device) -> Segments:
        offsets = self.offsets or tuple(range(0, (len(self.sample) + 1) * length, length or 1))[: len(self.sample) + 1]
        if length == 0 and self.offsets is None:
            offsets = (0,) * (len(self.sample) + 1)
        order = sorted((i for i, s in enumerate(self.sample) if s != NO_SAMPLE), key=lambda i: self.sample[i])
        counts = [0] * self.n_samples
        for i in order:
            counts[self.sample[i]] += 1
        first = [0]
        for count in counts:
            first.append(first[-1] + count)

        def put(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(device)

        lengths = [e - s for s, e in zip(offsets, offsets[1:], strict=False)]
        layout = (self._per_sample(lengths), max(lengths, default=0), offsets[-1])
        return Segments.of([put(offsets), put(self.sample), put(order), put(first)], *layout)

    def _per_sample(self, lengths: list[int]) -> int:
        """n when the samples are 0, 0, …, 1, 1, … with n tokens each, else 0."""
        total = [0] * self.n_samples
        previous = 0
        for sample, length in zip(self.sample, lengths, strict=True):
            if sample < previous:  # also NO_SAMPLE
                return 0
            total[sample] += length
            previous = sample
        return total[0] if total and len(set(total)) == 1 else 0


@lru_cache(maxsize=64)
def _unnamed(n_samples: int, n_rows: int) -> Rows:
    return Rows((0,) * n_rows if n_samples == 1 else tuple(range(n_samples)), n_samples)


def as_segments(
    rows: Rows | Segments | Tensor | None, n_samples: int, lead: Sequence[int], device: torch.device
) -> Segments:
    """What the public functions accept as `rows`, laid out for x [R, L, ...] or [T, ...] whose `lead` is (R, L) or
    (T,). None is row i for sample i, or one sample for all.

    Raises:
        ValueError: `rows` was built for another number of samples or tokens.
    """
    length = lead[1] if len(lead) == 2 else 1
    if rows is None:
        rows = _unnamed(n_samples, lead[0])
    elif isinstance(rows, Tensor):
        rows = Rows.padded(rows, n_samples)
    segments = rows.segments(length, device) if isinstance(rows, Rows) else rows
    if segments.n_samples != n_samples:
        raise ValueError(f"rows were built for {segments.n_samples} samples, but a holds {n_samples}")
    if segments.n_tokens != lead[0] * length:
        raise ValueError(f"rows describe {segments.n_tokens} tokens, but x holds {lead[0] * length}")
    return segments


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(v) for v in values]
