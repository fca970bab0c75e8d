"""Requests of the OpenAI chat API: checked, with one clear message for everything that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data_prep.store.sample import Dialogue
from data_prep.text.dialogues import from_parts, text_of

_UNSUPPORTED = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "audio": (None,),
}
"""Keys that would change the answer and that are not supported, with the values that mean they are not used."""


class BadRequest(Exception):
    """A request that cannot be answered.

    Attributes:
        status: HTTP status, 4xx.
        param: The key at fault.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    messages: int = 200
    images: int = 8
    text: int = 200_000
    tokens: int = 1024


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        dialogue: Turns with text alone.
        images: URLs of its images in order.
        max_tokens, temperature, top_p, seed, stop, stream, include_usage: As OpenAI names them; a temperature that is
            not given is 0.
    """

    dialogue: list[dict[str, str]]
    images: list[str]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse(body: Any, name: str, limits: Limits) -> ChatRequest:
    """Check the body of `/v1/chat/completions`.

    Args:
        body: Decoded JSON.
        name: The model that is served.
        limits: What it may ask for.

    Raises:
        BadRequest: with what is wrong and where.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is a JSON object")
    if body.get("model") != name:
        raise BadRequest(f"there is no model {str(body.get('model'))[:80]!r}; this server has {name!r}", "model", 404)
    for key, unused in _UNSUPPORTED.items():
        if body.get(key) not in unused:
            raise BadRequest(f"{key} is not supported here", key)
    dialogue, images = _messages(body.get("messages"), limits)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options is an object", "stream_options")
    wanted = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return ChatRequest(
        dialogue,
        images,
        max_tokens=_number(body, wanted, 1, limits.tokens, limits.tokens, whole=True),
        temperature=_number(body, "temperature", 0, 2, 0.0),
        top_p=_number(body, "top_p", 1e-6, 1, 1.0),
        seed=None if body.get("seed") is None else _number(body, "seed", -(2**63), 2**63 - 1, 0, whole=True),
        stop=_stop(body.get("stop")),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _number(body: dict[str, Any], key: str, low: float, high: float, default: Any, whole: bool = False) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value != value:
        raise BadRequest(f"{key} is a {'whole ' if whole else ''}number", key)
    if not low <= value <= high:
        raise BadRequest(f"{key} is between {low:g} and {high:g}", key)
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if not isinstance(value, bool | None):
        raise BadRequest(f"{key} is true or false", key)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > 4
        or not all(isinstance(t, str) and 0 < len(t) <= 100 for t in texts)
    ):
        raise BadRequest("stop is a text, or a list of up to 4, of 1 to 100 characters", "stop")
    return tuple(texts)


def _messages(value: Any, limits: Limits) -> tuple[Dialogue, list[str]]:
    if not isinstance(value, list) or not value:
        raise BadRequest("messages is a list of at least one message", "messages")
    if len(value) > limits.messages:
        raise BadRequest(f"at most {limits.messages} messages are taken", "messages")
    said: list[tuple[str, list[str | None]]] = []
    images: list[str] = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadRequest(f"{where} is an object", where)
        role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
        if role not in ("system", "user", "assistant"):
            raise BadRequest(f"{where}.role is system, user or assistant", f"{where}.role")
        parts, found = _content(message.get("content"), where)
        if found and role != "user":
            raise BadRequest(f"{where}: images stand in a user's message", where)
        images += found
        said.append((role, parts))
    if said[-1][0] != "user":
        raise BadRequest("the last message is the user's", "messages")
    if len(images) > limits.images:
        raise BadRequest(f"{len(images)} images; at most {limits.images} are taken", "messages")
    if sum(len(text_of(parts)) for _, parts in said) > limits.text:
        raise BadRequest(f"more than {limits.text} characters of text", "messages")
    return from_parts(said), images


def _content(content: Any, where: str) -> tuple[list[str | None], list[str]]:
    """Parts of a content, None for an image, and the images."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content is a text or a list of parts", f"{where}.content")
    parts: list[str | None] = []
    images: list[str] = []
    for number, part in enumerate(content):
        at = f"{where}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise BadRequest(f"{at}.image_url.url is a text", at)
            images.append(url)
            parts.append(None)
        else:
            raise BadRequest(f"{at} is {{type: text, text}} or {{type: image_url, image_url: {{url}}}}", at)
    return parts, images
