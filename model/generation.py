"""Answers of the model as text: the one place that generates and cuts what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from model.batch import Batch
from model.vlm import VisionLanguageModel


class AnswerFormat(Protocol):
    """What has to be known of the text template; a `TextEncoder` of `data_prep.text` is one.

    Attributes:
        answer_end: Ids that end an answer, each on its own.
        answer_prefix: Ids that the template has the model produce before an answer.
        pad_id: Id to pad with.
    """

    answer_end: tuple[int, ...]
    answer_prefix: tuple[int, ...]
    pad_id: int

    def decode(self, ids: list[int]) -> str:
        """The answer in generated ids, without its end and what the template puts before it."""


def answers(
    model: VisionLanguageModel,
    batch: Batch,
    formats: Sequence[AnswerFormat],
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """The model's answers to left-padded prompts, greedy by default.

    Args:
        model: In evaluation mode.
        batch: Prompts.
        formats: That of every row, or a single one for all.
        max_new_tokens: Longest answer, its end included; what the template puts before it is not counted.
        options: Of transformers' `generate`.

    Returns:
        One text per row.
    """
    if len(formats) == 1:
        formats = list(formats) * len(batch.input_ids)
    out = model.generate(
        batch,
        max_new_tokens + max(len(each.answer_prefix) for each in formats),
        pad_token_id=formats[0].pad_id,
        answer_end=sorted({end for each in formats for end in each.answer_end}),
        **options,
    )
    return [each.decode(ids) for each, ids in zip(formats, out.tolist(), strict=True)]
