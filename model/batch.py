"""The one batch layout that every connector and every stage reads."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.ops import NO_SAMPLE, Rows

IGNORE = -100
"""Label of a position that carries no loss (the convention of torch's cross-entropy and of transformers)."""


@dataclass
class Batch:
    """Text rows, the images they talk about, and which belongs to which.

    A *sample* is one set of images and owns one set of perceptual weights. It may have several text *rows*
    (independent dialogues about the same images); a row without an image still belongs to a sample, whose set of
    images is empty.

    Shapes: R rows, L tokens, S samples, I images, P patches, V features.

    Attributes:
        input_ids: int64 [R, L].
        attention_mask: int64 [R, L], 1 on text and 0 on padding (padding on the right in training, on the left when
            generating).
        labels: int64 [R, L], the token itself where it is a target and `IGNORE` elsewhere; not shifted.
        row_to_sample: int64 [R], the sample of each row.
        images: Float [I, 3, H, W] normalised pixels, or [I, P, V] cached features of the frozen encoder. Never
            empty: a batch without images holds one dummy (ZeRO-3 needs every rank to run the same modules).
        image_to_sample: int64 [I].
        image_weight: Float [I], 1 for an image and 0 for the dummy.
        n_samples: S.
        image_at: int64 [R, K], the column of `input_ids` in front of which each image of the row's sample stands, in
            the order of `images`: where visual tokens go. -1: the row has no k-th image. None: all in front of the row.
        slots: Bool [R, L], dead tokens that nothing attends to (`attention_mask` 0) but that have a position: as the
            released VLoRA has one at each image (`data.compat=official`). None: there are none.
        rows: Which sample's weights each row uses, `NO_SAMPLE` where the sample has no image: worked out here, on the
            host, once per batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    row_to_sample: Tensor
    images: Tensor
    image_to_sample: Tensor
    image_weight: Tensor
    n_samples: int
    image_at: Tensor | None = None
    slots: Tensor | None = None
    rows: Rows = None  # type: ignore[assignment]  # never None: worked out below where it is not given

    def __post_init__(self) -> None:
        if self.rows is None:
            seen = torch.zeros(self.n_samples).index_add(0, self.image_to_sample, self.image_weight.float())[
                self.row_to_sample
            ]
            sample = self.row_to_sample.masked_fill(seen == 0, NO_SAMPLE)
            self.rows = Rows.padded(sample, self.n_samples)

    def text_only(self, rows: list[int]) -> Batch:
        """Some of the rows, without their images, as one sample."""
        chosen = torch.tensor(rows, device=self.input_ids.device)
        return replace(
            self,
            input_ids=self.input_ids[chosen],
            attention_mask=self.attention_mask[chosen],
            labels=self.labels[chosen],
            row_to_sample=torch.zeros_like(chosen),
            images=self.images[:1],
            image_to_sample=self.image_to_sample.new_zeros(1),
            image_weight=self.image_weight.new_zeros(1),
            n_samples=1,
            rows=Rows.padded([NO_SAMPLE] * len(rows), 1),
        )

    @property
    def has_image(self) -> bool:
        """Whether any image of the batch is real."""
        return bool(self.image_weight.any())

    @property
    def n_targets(self) -> int:
        """Supervised tokens, counted as the loss counts them: after the shift by one."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str, image_dtype: torch.dtype | None = None) -> Batch:
        """Copy to `device`; images also to `image_dtype`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if image_dtype is not None:
            moved["images"] = moved["images"].to(image_dtype)
        return replace(self, **moved)
