"""The one JSON file of a run, written as results come in, and the tables made from it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.files import write_atomically
from common.markdown import as_table

Row = dict[str, Any]
_PACKAGES = ("torch", "triton", "transformers", "deepspeed", "numpy", "liger-kernel", "apex", "flash-attn", "peft")


class Results:
    """Reads and writes the file. Parts run one after another, each in its own process; none holds rows back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """`{"environment": ..., "parts": {name: {"status": ..., "rows": {row: values}}}}`."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"environment": {}, "parts": {}}

    def environment(self, facts: Row) -> None:
        """Begin a new file."""
        write_atomically(self.path, json.dumps({"environment": facts, "parts": {}}, indent=1))

    def row(self, part: str, name: str, values: Row) -> None:
        """Add a row and print it."""
        found = self.read()
        found["parts"].setdefault(part, {"rows": {}})["rows"][name] = values
        write_atomically(self.path, json.dumps(found, indent=1))
        print(f"  {part}: {name}: {', '.join(f'{k} {_short(v)}' for k, v in values.items())}", flush=True)

    def status(self, part: str, status: str, seconds: float, error: str = "") -> None:
        """How a part ended: ok, failed, timeout or no time left."""
        found = self.read()
        entry = found["parts"].setdefault(part, {"rows": {}})
        entry |= {"status": status, "seconds": round(seconds, 1)} | ({"error": error} if error else {})
        write_atomically(self.path, json.dumps(found, indent=1))
        print(f"{part}: {status} after {seconds:.0f} s {error}", flush=True)


def environment(device: torch.device, tiny: bool, commit: str | None) -> Row:
    """Device, driver, versions, commit."""
    found: Row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "changed_files": len(_output("git", "status", "--porcelain", "--untracked-files=no").splitlines()),
        "device": platform.processor() or platform.machine(),
        "tiny": tiny,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":  # asked without making a CUDA context: the parts are forked from this process
        fields = _output(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"
        )
        found["device"], found["driver"], found["memory"], found["power_limit"] = (
            fields.splitlines()[0].split(", ") if fields else ["unknown GPU", None, None, None]
        )
    return found


def tables(found: dict[str, Any]) -> str:
    """Markdown: one table per part, one column per value that any of its rows has."""
    environment = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment.items() if v is not None)
    lines = [versions, ""]
    for part, entry in found["parts"].items():
        lines += [f"### {part} ({entry.get('status', 'unfinished')}, {entry.get('seconds', '?')} s)", ""]
        if entry.get("error"):
            lines += [f"`{entry['error']}`", ""]
        rows = entry["rows"]
        columns = list(dict.fromkeys(key for values in rows.values() for key in values))
        if columns:
            body = [[name, *(_short(values.get(c)) for c in columns)] for name, values in rows.items()]
            lines += [as_table([["", *columns], *body]), ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def main() -> None:
    """`python -m benchmarks.gpu.results FILE`: the tables of an earlier run."""
    print(tables(Results(Path(sys.argv[1])).read()))


if __name__ == "__main__":
    main()
