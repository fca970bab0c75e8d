"""A real server on a real port, over a tiny model."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="pip install -r requirements-serve.txt")
import uvicorn

from serve.api import ServerSettings, Service
from tests.vlora.conftest import loaded, parts, trained  # noqa: F401  (fixtures)

NAME = "tiny"


@contextmanager
def running(model, **settings) -> Iterator[tuple[Service, str]]:
    """A service and its address."""
    service = Service(*model, ServerSettings(NAME, **settings))
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield service, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()


@pytest.fixture(scope="module")
def served(loaded) -> Iterator[tuple[Service, str]]:  # noqa: F811
    with running(loaded) as found:
        yield found


def uri(image: bytes) -> str:
    """A data URI."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def user(question: str, *images: bytes) -> dict:
    """A user's message."""
    shown = [{"type": "image_url", "image_url": {"url": uri(image)}} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
