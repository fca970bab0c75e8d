"""The HTTP side of the server: OpenAI's chat API, health, metrics and the web page, all within bounds."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool

from data_prep.store.errors import DataError, Defect
from data_prep.text.encoder import Encoded
from model.generator.weights import base_norms
from serve import batcher as batching
from serve.batcher import Batcher, QueueFull
from serve.images import ImageCache, Sources
from serve.protocol import BadRequest, ChatRequest, Limits, parse
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAProcessor

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'"


@dataclass(frozen=True)
class ServerSettings:
    """What the server lets in.

    Attributes:
        name: Of the model, as clients name it.
        api_key: What clients send as bearer token; None: no key is asked for.
        max_body: Bytes of a request.
        max_rows, max_waiting: Requests decoded together, and waiting.
        seconds: A request may take.
        cache_bytes: Of image weights that are kept.
        limits, sources: Of one request, and where its images may come from.
    """

    name: str
    api_key: str | None = None
    max_body: int = 24 << 20
    max_rows: int = 16
    max_waiting: int = 64
    seconds: float = 120.0
    cache_bytes: int = 1 << 30
    limits: Limits = field(default_factory=Limits)
    sources: Sources = field(default_factory=Sources)


class _Metrics:
    def __init__(self, batcher: Batcher, cache: ImageCache) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vlora_requests", "Requests by HTTP status", ["status"], registry=self.registry)
        self.seconds = Histogram("vlora_request_seconds", "Time of an answer", registry=self.registry)
        self.first = Histogram("vlora_first_token_seconds", "Time to the first token", registry=self.registry)
        for name, text, read in (
            ("vlora_active_requests", "Requests being decoded", lambda: batcher.active),
            ("vlora_waiting_requests", "Requests waiting", lambda: batcher.waiting),
            ("vlora_generated_tokens", "Tokens so far", lambda: batcher.generated),
            ("vlora_cached_images", "Images whose weights are kept", lambda: len(cache)),
            ("vlora_cached_bytes", "Bytes of those weights", lambda: cache.bytes),
            ("vlora_image_cache_hits", "Images found in the cache", lambda: cache.hits),
            ("vlora_image_cache_misses", "Images encoded", lambda: cache.misses),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)


class Service:
    """Everything a running server holds; `app` is its ASGI application.

    Args:
        model, processor: What answers.
        settings: What is let in.
    """

    def __init__(
        self, model: VLoRAForConditionalGeneration, processor: VLoRAProcessor, settings: ServerSettings
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.cache = ImageCache(settings.cache_bytes)
        self.batcher = Batcher(model, processor, self.cache, settings.max_rows, settings.max_waiting)
        self.metrics = _Metrics(self.batcher, self.cache)
        self.started = int(time.time())
        self._base = base_norms(model.model.llm, model.model.placement) if model.model.placement is not None else {}
        self.app = self._app()

    def close(self) -> None:
        """End the model's thread."""
        self.batcher.close()

    def _app(self) -> FastAPI:
        app = FastAPI(title="VLoRA", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/vlora/map", self.weight_map, methods=["POST"])
        app.add_api_route("/", self.page, methods=["GET"])
        app.add_api_route("/page/{name}", self.page, methods=["GET"])

        app.add_middleware(_Guard, service=self)

        @app.exception_handler(BadRequest)
        async def bad_request(_: Request, error: BadRequest) -> Response:
            return _error(error.status, str(error), error.param)

        @app.exception_handler(404)
        async def missing(_: Request, __: Exception) -> Response:
            return _error(404, "there is no such address")

        @app.exception_handler(405)
        async def method(_: Request, __: Exception) -> Response:
            return _error(405, "this address does not take this method")

        return app

    def refused(self, request: Request) -> Response | None:
        """The answer to a request without the key, where one is needed."""
        key = self.settings.api_key
        if key is None or not request.url.path.startswith(("/v1/", "/vlora/", "/metrics")):
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if secrets.compare_digest(given.encode(), key.encode()):
            return None
        return _error(401, "the API key is missing or wrong", kind="authentication_error")

    async def health(self) -> Response:
        """200 while the model answers."""
        alive = self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """In Prometheus' text form."""
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """The one model."""
        one = {"id": self.settings.name, "object": "model", "created": self.started, "owned_by": "vlora"}
        return JSONResponse({"object": "list", "data": [one]})

    async def page(self, name: str = "index.html") -> Response:
        """The web page."""
        known = {file.name: file for file in _PAGE.iterdir() if file.is_file()}
        if name not in known:
            raise BadRequest("there is no such address", status=404)
        return FileResponse(known[name], headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})

    async def weight_map(self, request: Request) -> Response:
        """`{"image": data URI}` to |dW| / |W| by layer and type."""
        body = await self._json(request)
        if not isinstance(body, dict) or not isinstance(body.get("image"), str):
            raise BadRequest('the body is {"image": "data:image/...;base64,..."}', "image")
        if self.model.model.placement is None:
            raise BadRequest("this model's connector makes no weights")
        seen = await run_in_threadpool(self._see, [body["image"]])
        weights = await run_in_threadpool(self.model.perceive, seen[0].pixels.to(self.model.device))
        sites = [
            {"layer": site.layer, "type": site.type, "share": norm.item() / self._base[site]}
            for site, norm in weights.norms().items()
        ]
        return JSONResponse({"sites": sites})

    async def chat(self, request: Request) -> Response:
        """OpenAI's `/v1/chat/completions`."""
        asked = parse(await self._json(request), self.settings.name, self.settings.limits)
        started = time.monotonic()
        images = await run_in_threadpool(self._see, asked.images)
        prompt = await run_in_threadpool(self._encode, asked)
        ids = prompt.input_ids
        pieces: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str, reason: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (piece, reason))

        work = batching.Request(
            ids,
            images,
            self._budget(asked, len(ids)),
            tell,
            asked.temperature,
            asked.top_p,
            asked.seed,
            asked.stop,
            started + self.settings.seconds,
            prompt.image_at,
        )
        try:
            self.batcher.submit(work)
        except QueueFull as error:
            return _error(429, f"the server is busy: {error}; try again", kind="rate_limit_error", retry=1)
        watch = asyncio.create_task(self._watch(request, work, pieces))
        reply = _Reply(self.settings.name, len(ids), len(self.processor.text.answer_prefix))
        if asked.stream:
            # The first piece decides the status: what fails before it is an error, not a broken stream.
            first = await pieces.get()
            watch.cancel()  # from here on, sending tells when the client has gone
            if first[1] is not None and (failed := _failure(first[1])):
                return failed
            self.metrics.first.observe(time.monotonic() - started)
            events = self._events(asked, reply, first, pieces, work, started)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        text = ""
        reason = None
        while reason is None:
            piece, reason = await pieces.get()
            text += piece
        watch.cancel()
        if failed := _failure(reason):
            return failed
        self.metrics.seconds.observe(time.monotonic() - started)
        return JSONResponse(reply.whole(text, reason, work.new_tokens))

    async def _watch(self, request: Request, work: batching.Request, pieces: asyncio.Queue) -> None:
        """Cancel the work when the client goes, or the model's thread ends."""
        while not await request.is_disconnected():
            if not self.batcher.alive:
                pieces.put_nowait(("", "error: the model's thread has ended"))
                return
            await asyncio.sleep(0.25)
        work.cancelled.set()

    async def _events(
        self,
        asked: ChatRequest,
        reply: _Reply,
        first: tuple[str, str | None],
        pieces: asyncio.Queue,
        work: batching.Request,
        started: float,
    ) -> AsyncIterator[str]:
        try:
            yield reply.event({"role": "assistant", "content": ""}, None)
            piece, reason = first
            while True:
                if piece:
                    yield reply.event({"content": piece}, None)
                if reason is not None:
                    break
                piece, reason = await pieces.get()
            yield reply.event({}, reason if reason in ("stop", "length") else "length")
            if asked.include_usage:
                yield reply.usage_event(work.new_tokens)
            yield "data: [DONE]\n\n"
            self.metrics.seconds.observe(time.monotonic() - started)
        finally:
            work.cancelled.set()  # also where the client has gone

    async def _json(self, request: Request) -> Any:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.settings.max_body:
                raise BadRequest(f"the request is larger than {self.settings.max_body} bytes", status=413)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("the body is no JSON") from error

    def _see(self, urls: list[str]) -> list[Any]:
        seen = []
        for number, url in enumerate(urls):
            try:
                seen.append(self.settings.sources.see(url, self.processor))
            except (DataError, Defect) as error:
                raise BadRequest(f"image {number + 1}: {error}", "messages") from error
        return seen

    def _encode(self, asked: ChatRequest) -> Encoded:
        try:
            return self.processor.text.prompt(asked.dialogue, len(asked.images))
        except DataError as error:
            raise BadRequest(str(error), "messages") from error

    def _budget(self, asked: ChatRequest, prompt: int) -> int:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        left = longest - prompt - len(asked.images) * self.model.model.connector.visual_tokens
        if left < 1:
            raise BadRequest(f"the conversation has {prompt} tokens; the model reads {longest}", "messages")
        return min(asked.max_tokens + len(self.processor.text.answer_prefix), left)


class _Guard:
    """Asks for the key and counts answers. Plain ASGI, so that what is behind it still sees a client go."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(str(message["status"])).inc()
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = self.service.refused(Request(scope))
        await (self.app if refused is None else refused)(scope, receive, counted)


class _Reply:
    """The shapes of OpenAI's answers."""

    def __init__(self, model: str, prompt_tokens: int, prefix: int) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self._prefix = prompt_tokens, prefix

    def usage(self, new: int) -> dict[str, int]:
        new = max(0, new - self._prefix)  # what the template puts before an answer is none of it
        total = self.prompt_tokens + new
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": total}

    def whole(self, text: str, reason: str, new: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": self.usage(new)}

    def event(self, delta: dict[str, str], reason: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event(self.head | {"object": "chat.completion.chunk", "choices": [choice]})

    def usage_event(self, new: int) -> str:
        return _event(self.head | {"object": "chat.completion.chunk", "choices": [], "usage": self.usage(new)})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _failure(reason: str) -> Response | None:
    """The answer to a request that was not answered."""
    if reason in ("stop", "length"):
        return None
    if reason == "timeout":
        return _error(504, "the answer took too long", kind="timeout_error")
    if reason == "cancelled":
        return _error(499, "the client has gone")
    return _error(500, "the server failed on this request", kind="server_error")


def _error(
    status: int, message: str, param: str | None = None, kind: str = "invalid_request_error", retry: int | None = None
) -> Response:
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status, headers={"Retry-After": str(retry)} if retry else None)
