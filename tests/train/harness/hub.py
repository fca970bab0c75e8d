"""A hub of data sets on this machine: the part of Hugging Face's protocol that loading one asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.train.harness.loopback import Handler, listening

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repos: dict[str, dict[str, Path]]) -> Iterator[str]:
    """Serve data sets.

    Args:
        repos: `OWNER/NAME` to its files by their path in it.

    Yields:
        What HF_ENDPOINT has to be.
    """

    class Answers(Handler):
        def do_GET(self) -> None:
            path = urlparse(self.path).path.strip("/")
            for repo, files in repos.items():
                for start, answer in ((f"api/datasets/{repo}", self.about), (f"datasets/{repo}/resolve", self.file)):
                    if f"{path}/".startswith(f"{start}/"):
                        answer(repo, files, path.removeprefix(start).strip("/"))
                        return
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:  # paths-info
            body = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
            path = urlparse(self.path).path.strip("/")
            repo = next(repo for repo in repos if path.startswith(f"api/datasets/{repo}/paths-info"))
            asked = body.get("paths", [])
            self.reply(200, [_entry(name, file) for name, file in repos[repo].items() if name in asked])

        def about(self, repo: str, files: dict[str, Path], rest: str) -> None:
            kind, _, where = rest.partition("/")
            if kind == "tree":
                folder = where.partition("/")[2]
                inside = {name: file for name, file in files.items() if name.startswith(f"{folder}/" if folder else "")}
                folders = {name.rpartition("/")[0] for name in inside} - {"", folder}
                entries: list[dict[str, Any]] = [_entry(name, file) for name, file in inside.items()]
                self.reply(200, [*entries, *({"type": "directory", "path": name, "oid": _COMMIT} for name in folders)])
            else:
                names = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": _COMMIT, "siblings": names, "private": False, "tags": [], "downloads": 0}
                self.reply(200, info | {"lastModified": "2024-01-01T00:00:00.000Z"})

        def file(self, _: str, files: dict[str, Path], rest: str) -> None:
            name = rest.partition("/")[2]
            if name not in files:
                self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            data = files[name].read_bytes()
            self.reply(200, data, {"X-Repo-Commit": _COMMIT, "ETag": f'"{_entry(name, files[name])["oid"]}"'})

        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    with listening(Answers) as address:
        yield address


def _entry(name: str, file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
