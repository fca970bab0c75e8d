"""`python -m serve run=RUN`: an OpenAI-compatible server and a web page for a trained model.

    python -m serve run=outputs/RUN                       # http://127.0.0.1:8000
    VLORA_API_KEY=... python -m serve run=outputs/RUN host=0.0.0.0

Clients: `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=...)`, images as data URIs. No URL that a request names is
fetched and no file is opened, but for the prefixes in `allow`. Needs the packages of requirements-serve.txt.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from common.errors import ConfigError, UserError, run_cli
from common.options import parse_options
from common.settings import setting
from serve.options import ModelOptions


@dataclass
class Options(ModelOptions):
    """Keys of the command line.

    Attributes:
        host: Address to listen on.
        port: Its port.
        name: The model's name for clients; null: that of the run directory or folder.
        api_key: What clients must send; null: the environment's VLORA_API_KEY, or none.
        allow: Beginnings of URLs (`https://host/path/`, `file:///folder/`) that requests may name, with commas between.
        max_rows: Requests decoded together.
        max_waiting: Requests that may wait; more are answered 429.
        max_tokens: Longest answer.
        max_images: Images of a request.
        max_body_mb: Size of a request.
        max_pixels: Of one image.
        timeout: Seconds an answer may take.
        cache_mb: Image weights that are kept.
    """

    host: str = "127.0.0.1"
    port: int = setting(8000, within="[0, 65535]")
    name: str | None = None
    api_key: str | None = None
    allow: str | None = None
    max_rows: int = setting(16, within="[1, 1024]")
    max_waiting: int = setting(64, within="[1, 100000]")
    max_tokens: int = setting(1024, within="[1, 1000000]")
    max_images: int = setting(8, within="[0, 1000]")
    max_body_mb: int = setting(24, within="[1, 1000]")
    max_pixels: int = setting(25_000_000, within="[1, 1e9]")
    timeout: float = setting(120.0, within="(0, 1e6]")
    cache_mb: int = setting(1024, within="[1, 1000000]")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The parts of `allow`."""
        return tuple(part.strip() for part in (self.allow or "").split(",") if part.strip())

    def check(self, prefix: str) -> None:
        """A key that a header can carry, and beginnings of URLs.

        Raises:
            ConfigError: names what is none.
        """
        super().check(prefix)
        if self.api_key and not self.api_key.isascii():
            raise ConfigError(f"{prefix}api_key: write ASCII; a header carries nothing else")
        for part in self.prefixes:
            url = urlparse(part)
            web = url.scheme in ("http", "https") and url.netloc
            if not (url.path.startswith("/") and (web or url.scheme == "file")):
                raise ConfigError(f"{prefix}allow={part}: write https://HOST/PATH or file:///FOLDER/")

    def listen(self) -> None:
        """Try the address, before a model is loaded.

        Raises:
            UserError: nothing can listen there.
        """
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((self.host, self.port), family=family).close()
        except OSError as error:
            raise UserError(f"host={self.host} port={self.port}: cannot listen there ({error.strerror})") from error


def main() -> int:
    """Serve until interrupted."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    try:
        import uvicorn

        from serve.api import ServerSettings, Service
        from serve.images import Sources
        from serve.protocol import Limits
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install -r requirements-serve.txt") from error
    options.listen()
    model, processor = options.open()
    path = Path(options.run).expanduser().resolve()
    name = options.name or (path.parent.name if path.name == "export" else path.name)
    settings = ServerSettings(
        name=name,
        api_key=options.api_key or os.environ.get("VLORA_API_KEY") or None,
        max_body=options.max_body_mb << 20,
        max_rows=options.max_rows,
        max_waiting=options.max_waiting,
        seconds=options.timeout,
        cache_bytes=options.cache_mb << 20,
        limits=Limits(images=options.max_images, tokens=options.max_tokens),
        sources=Sources(options.prefixes, options.max_body_mb << 20, options.max_pixels),
    )
    if settings.api_key is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: anyone who reaches {options.host} can use this server; set api_key=...", file=sys.stderr)
    service = Service(model, processor, settings)
    print(f"{name}: http://{options.host}:{options.port} (page), /v1 (OpenAI API), /health, /metrics", flush=True)
    try:
        uvicorn.run(service.app, host=options.host, port=options.port, log_level="warning")
    finally:
        service.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
