"""Reads wandb's offline files back, from their bytes: wandb itself only uploads them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record


@dataclass
class Lifetime:
    """One `wandb.init` to `finish`.

    Attributes:
        id, group, job_type: Of the run.
        rows: What was logged, in order.
        artifacts: Files that a sync will upload, by their name there: those of tables, pictures among them.
        files: Others, below the lifetime's folder `files`.
    """

    id: str = ""
    group: str = ""
    job_type: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, Path] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def read(folder: Path) -> list[Lifetime]:
    """All lifetimes below `folder/wandb`, in order of time."""
    lifetimes = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        lifetime = Lifetime()
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                run = record.run
                lifetime.id, lifetime.group, lifetime.job_type = run.run_id, run.run_group, run.job_type
            if record.HasField("history"):
                items = record.history.item
                lifetime.rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
            if record.HasField("artifact"):
                lifetime.artifacts |= {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
            if record.HasField("files"):
                lifetime.files += [file.parent / "files" / each.path for each in record.files.files]
        lifetimes.append(lifetime)
    return lifetimes


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: 7 bytes of file header, then blocks of 32 KiB holding whole or split records."""
    position, parts = 7, []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # too short for a record's header: padding
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            return
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield b"".join(parts)
            parts = []
