"""Continuous batching: requests about different images are decoded together and join and leave at any token.

One thread owns the model. New requests are read (those that wait, together: their prompts, and their images' weights
from the cache), then join the rows in flight; every step then computes one token of every row. Rows see only
themselves: each has its own keys and values, mask, positions and weights, and its own random numbers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from model.generator.weights import PerceptualWeights
from serve.images import ImageCache, Seen, SeenImage
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAProcessor
from vlora.streaming import Pieces


class QueueFull(Exception):
    """More requests are waiting than are let in."""


@dataclass
class Request:
    """One question and how it is to be answered.

    Attributes:
        ids: Prompt, token ids.
        images: What it is about.
        image_at: In front of which token each stands, for a connector that puts them into the input.
        max_tokens: Longest answer, its end included.
        temperature, top_p, seed: Of sampling; temperature 0: greedy.
        stop: Texts that end the answer; they are not part of it.
        deadline: `time.monotonic()` after which it is given up.
        tell: Called in the model's thread with every piece of text, and at the end with `(piece, reason)`: `stop`,
            `length`, `timeout`, `cancelled`, or `error: ...`.
    """

    ids: list[int]
    images: list[SeenImage]
    max_tokens: int
    tell: Callable[[str, str | None], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    deadline: float = float("inf")
    image_at: tuple[int, ...] = ()
    cancelled: threading.Event = field(default_factory=threading.Event)
    new_tokens: int = 0


class _Row:
    """A request in flight."""

    def __init__(self, request: Request, seen: Seen | None, processor: VLoRAProcessor) -> None:
        self.request, self.seen = request, seen
        self.pieces, self.held, self.text = Pieces(processor), "", ""
        self.random = torch.Generator()
        self.random.manual_seed(request.seed) if request.seed is not None else self.random.seed()
        self.last = 0

    def choose(self, logits: Tensor) -> int:
        """The next token from logits [vocabulary]."""
        if self.request.temperature == 0:
            return int(logits.argmax())
        chances = (logits.float().cpu() / self.request.temperature).softmax(-1)
        if self.request.top_p < 1:
            ordered, order = chances.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= self.request.top_p] = 0
            chances = torch.zeros_like(chances).scatter(0, order, ordered)
        return int(torch.multinomial(chances, 1, generator=self.random))

    def take(self, token: int, ends: tuple[int, ...]) -> str | None:
        """Add a token, tell its text, and return why the answer ends here, if it does."""
        self.last = token
        self.request.new_tokens += 1
        ended = token in ends
        finished = "stop" if ended else "length" if self.request.new_tokens >= self.request.max_tokens else None
        if not ended:
            self.held += self.pieces.add([token])
        if finished:
            self.held += self.pieces.finish()
        stop, at = min(
            ((s, self.held.find(s)) for s in self.request.stop if s in self.held),
            key=lambda found: found[1],
            default=("", -1),
        )
        if at >= 0:
            self._tell(self.held[:at], "stop")
            return "stop"
        # What may be the beginning of a stop text waits until that is known.
        keep = 0 if finished else max((_overlap(self.held, s) for s in self.request.stop), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self._tell(piece, finished)
        return finished

    def _tell(self, piece: str, reason: str | None) -> None:
        if piece or reason:
            self.request.tell(piece, reason)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Batcher:
    """Runs the model for all requests.

    Args:
        model, processor: What answers.
        cache: Weights of images by content.
        max_rows: Requests decoded together.
        max_waiting: Requests that may wait for a place.

    Attributes:
        active, generated: Requests in flight and tokens so far, for metrics.
    """

    def __init__(
        self,
        model: VLoRAForConditionalGeneration,
        processor: VLoRAProcessor,
        cache: ImageCache,
        max_rows: int = 16,
        max_waiting: int = 64,
    ) -> None:
        self.model, self.processor, self.cache, self.max_rows = model, processor, cache, max_rows
        self._waiting: queue.Queue[Request] = queue.Queue(max_waiting)
        self._rows: list[_Row] = []
        self._kv: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.int64)
        self._seen: dict[str, Any] = {}
        self._stopping = threading.Event()
        self.generated = 0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Requests in flight."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Let a request wait for its place.

        Raises:
            QueueFull: too many wait already.
        """
        try:
            self._waiting.put_nowait(request)
        except queue.Full as error:
            raise QueueFull(f"{self._waiting.maxsize} requests are waiting already") from error

    def close(self) -> None:
        """End the thread; what is in flight is told `cancelled`."""
        self._stopping.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._leave()
                self._enter()
                if self._rows:
                    self._step()
            except Exception as error:  # no request may take the others' thread with it
                for row in self._rows:
                    row.request.tell("", f"error: {type(error).__name__}")
                self._rows, self._kv = [], None
        for row in self._rows:
            row.request.tell("", "cancelled")

    def _over(self, request: Request) -> str | None:
        if request.cancelled.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() > request.deadline else None

    def _leave(self) -> None:
        """Rows that nobody waits for any more."""
        reasons = [self._over(row.request) for row in self._rows]
        for row, reason in zip(self._rows, reasons, strict=True):
            if reason:
                row.request.tell("", reason)
        self._keep([number for number, reason in enumerate(reasons) if not reason])

    def _enter(self) -> None:
        """Let waiting requests in, as many as there are places."""
        fresh: list[Request] = []
        while len(self._rows) + len(fresh) < self.max_rows:
            try:
                idle = not self._rows and not fresh
                request = self._waiting.get(timeout=0.05) if idle else self._waiting.get_nowait()
            except queue.Empty:
                break
            if reason := self._over(request):
                request.tell("", reason)
            else:
                fresh.append(request)
        for together in _alike(fresh):
            self._admit(together)

    def _admit(self, requests: list[Request]) -> None:
        """Read prompts together, and let their rows join the others; a request that fails, fails alone."""
        try:
            read = self._read(requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0].tell("", f"error: {type(error).__name__}")
                return
            for request in requests:
                self._admit([request])
            return
        self._join(*read)

    @torch.no_grad()
    def _read(self, requests: list[Request]) -> tuple[list[_Row], DynamicCache, Tensor]:
        """The rows of requests, what the model keeps of them, and where that is something: int64 [R, columns]."""
        shown = self.cache.look(self.model, [request.images for request in requests])
        inputs = self.processor.batch([request.ids for request in requests], [[] for _ in requests])
        mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        seen = [None if isinstance(each, Tensor) else each for each in shown]
        inputs |= _keyword(seen)
        visible = [(number, each) for number, each in enumerate(shown) if isinstance(each, Tensor)]
        if visible:
            inputs["pixel_values"] = torch.cat([pixels for _, pixels in visible])
            owners = torch.tensor([number for number, pixels in visible for _ in pixels])
            first = torch.tensor([length - len(request.ids) for request in requests])
            inputs["image_to_row"] = owners
            inputs["image_at"] = torch.cat([_places(requests[number]) for number, _ in visible]) + first[owners]
            tokens = torch.bincount(owners, minlength=len(requests)) * self.model.model.connector.visual_tokens
            size = int((mask.sum(1) + tokens).max())
            mask = (torch.arange(size) >= size - (mask.sum(1) + tokens)[:, None]).long()
        cache = DynamicCache()
        out = self.model(**inputs.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.generated += len(requests)
        rows = [_Row(request, each, self.processor) for request, each in zip(requests, seen, strict=True)]
        ends = self.processor.text.answer_end
        over = [row.take(row.choose(logits), ends) for row, logits in zip(rows, out.logits[:, -1], strict=True)]
        kept = [number for number, reason in enumerate(over) if not reason]
        return [rows[number] for number in kept], _rows_of(cache, kept), mask[kept]

    def _join(self, rows: list[_Row], new: DynamicCache, mask: Tensor) -> None:
        """Rows that have been read stand below those in flight; all end in the same column."""
        if not rows:
            return
        before, self._rows = self._rows, [*self._rows, *rows]
        if not before or self._kv is None:
            self._kv, self._mask = new, mask
        else:
            total = max(self._mask.shape[1], mask.shape[1])
            for mine, theirs in zip(self._kv.layers, new.layers, strict=True):
                mine.keys = torch.cat([_left(mine.keys, total), _left(theirs.keys, total)])
                mine.values = torch.cat([_left(mine.values, total), _left(theirs.values, total)])
            masks = [torch.nn.functional.pad(each, (total - each.shape[1], 0)) for each in (self._mask, mask)]
            self._mask = torch.cat(masks)
        self._trim()
        self._gather()

    def _keep(self, numbers: list[int]) -> None:
        """Drop the other rows, and the columns that only they used."""
        if len(numbers) == len(self._rows):
            return
        self._rows = [self._rows[number] for number in numbers]
        if not self._rows or self._kv is None:
            self._kv, self._seen = None, {}
            return
        self._kv, self._mask = _rows_of(self._kv, numbers), self._mask[numbers]
        self._trim()
        self._gather()

    def _trim(self) -> None:
        """Drop the columns that no row uses any more."""
        first = int(self._mask.any(0).int().argmax())
        if first and self._kv is not None:
            self._mask = self._mask[:, first:]
            for layer in self._kv.layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    def _gather(self) -> None:
        self._seen = _keyword([row.seen for row in self._rows])

    @torch.no_grad()
    def _step(self) -> None:
        """One token of every row."""
        device = self.model.device
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        mask = self._mask.to(device)
        out = self.model(
            input_ids=torch.tensor([[row.last] for row in self._rows], device=device),
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=self._kv,
            use_cache=True,
            **self._seen,
        )
        self.generated += len(self._rows)
        ends = self.processor.text.answer_end
        logits = out.logits[:, -1]
        over = [row.take(row.choose(logits[number]), ends) for number, row in enumerate(self._rows)]
        self._keep([number for number, reason in enumerate(over) if not reason])


def _alike(requests: list[Request]) -> Iterator[list[Request]]:
    """Groups of which no prompt is more than twice as long as another: padding is work too."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda each: len(each.ids)):
        if group and len(request.ids) > 2 * len(group[0].ids):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _places(request: Request) -> Tensor:
    """In front of which token of its prompt every view of its images stands: int64 [views]."""
    views = torch.tensor([len(image.pixels) for image in request.images])
    return torch.tensor(request.image_at, dtype=torch.int64).repeat_interleave(views)


def _rows_of(cache: DynamicCache, numbers: list[int]) -> DynamicCache:
    """Those rows of a cache alone."""
    for layer in cache.layers:
        if len(numbers) < len(layer.keys):
            kept = torch.tensor(numbers, dtype=torch.int64, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]
    return cache


def _keyword(each: list[Any]) -> dict[str, Any]:
    """What every row sees or None, as the model's forward takes it."""
    kind = next((type(seen) for seen in each if seen is not None), None)
    if kind is None:
        return {}
    return {"perceptual_weights" if kind is PerceptualWeights else "visual_context": kind.batch(each)}


def _left(x: Tensor, length: int) -> Tensor:
    """[R, H, L, D] padded in front to `length`."""
    return torch.nn.functional.pad(x, (0, 0, length - x.shape[2], 0))
