"""An answer in pieces while it is generated, cut and cleaned as the whole one is."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from vlora.processing import VLoRAProcessor


class Pieces:
    """Growing ids to the text that is new: what an unfinished character or word mark may still change is kept back."""

    def __init__(self, processor: VLoRAProcessor) -> None:
        self._text = processor.text
        self._ids: list[int] = []
        self.shown = ""

    def add(self, ids: list[int]) -> str:
        """The new piece of text; often empty."""
        self._ids += ids
        text = self._text.decode(self._ids) if len(self._ids) > len(self._text.answer_prefix) else ""
        text = text.rstrip("\ufffd")  # half a character
        if not text.startswith(self.shown):
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece

    def finish(self) -> str:
        """What was kept back, at the end of the answer."""
        text = self._text.decode(self._ids)
        piece, self.shown = text[len(self.shown) :] if text.startswith(self.shown) else "", text
        return piece


class AnswerStreamer(BaseStreamer):
    """Takes tokens from `generate` in one thread and gives text in another."""

    def __init__(self, processor: VLoRAProcessor) -> None:
        self._pieces = Pieces(processor)
        self._queue: Queue[str | None] = Queue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate`, first with the prompt."""
        if not self._prompt and (piece := self._pieces.add(value.flatten().tolist())):
            self._queue.put(piece)
        self._prompt = False

    def end(self) -> None:
        """Called by `generate` at the end."""
        if piece := self._pieces.finish():
            self._queue.put(piece)
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._queue.get()) is not None:
            yield piece
