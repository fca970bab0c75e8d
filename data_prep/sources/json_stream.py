"""JSON files that hold millions of records, read without ever being in memory as a whole.

`boundaries` goes through a file once and cuts it into stretches of records; `read` gives the records of a stretch.
An array of objects (LLaVA's files) and JSON Lines are both read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.store.errors import DataError

_CHUNK = 4 << 20
MAX_RECORD = 64 << 20
"""Largest accepted record, in bytes."""
_BETWEEN = re.compile(r"[\s,]*")
_decode = json.JSONDecoder().raw_decode


def boundaries(file: Path, every: int) -> list[int]:
    """Byte offsets of records 0, `every`, 2 `every`, ... and of the end of the last record.

    Args:
        file: The JSON file.
        every: Records per stretch.

    Raises:
        DataError: missing, malformed or cut short; names the byte.
    """
    check_exists(file)
    size = file.stat().st_size
    found: list[int] = []
    # Latin-1: one character is one byte, and what is JSON's own is ASCII.
    with file.open(encoding="latin-1", newline="") as stream:
        text = stream.read(_CHUNK)
        at = _skip(text, 0)
        array = text[at : at + 1] == "["
        at += array
        base = count = 0  # byte of text[0]; records so far
        while True:
            at = _skip(text, at)
            if at < len(text) and text[at] != "{":
                if array and text[at] == "]":
                    break
                raise DataError(f"{file}: byte {base + at}: expected a record in braces, found {text[at : at + 20]!r}")
            error = None
            if at < len(text):
                try:
                    end = _decode(text, at)[1]
                except json.JSONDecodeError as raised:
                    error = raised
                else:
                    if count % every == 0:
                        found.append(base + at)
                    count, at, last = count + 1, end, base + end
                    continue
            if error and len(text) - at > MAX_RECORD:
                raise DataError(f"{file}: byte {base + error.pos}: {error.msg}, in record {count}") from error
            more = stream.read(_CHUNK)
            if not more:
                if array or error:
                    where = f"in the middle of record {count}" if error else f"after record {count - 1}"
                    raise DataError(
                        f"{file} is not whole: it ends {where}, at byte {size}, or is malformed from byte {base + at} "
                        "on; fetch it again and compare its size and checksum"
                    )
                break
            base, text, at = base + at, text[at:] + more, 0
    if not count:
        raise DataError(f"{file} holds no record")
    return [*found, last]


def _skip(text: str, at: int) -> int:
    """Where the white space and commas at `at` end."""
    found = _BETWEEN.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def check_exists(file: Path) -> None:
    """Raise the `DataError` of a missing file."""
    if not file.is_file():
        raise DataError(f"{file} is missing; say where it is with source.json=FILE")


def read(file: Path, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Records between two of the `boundaries`. Bytes that are no UTF-8 become lone surrogates, for a check to name.

    Raises:
        DataError: the file has changed since.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        text = stream.read(stop - start).decode(errors="surrogateescape")
    at = _skip(text, 0)
    while at < len(text):
        try:
            record, at = _decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} has changed while it was read: {error}; prepare the data again") from error
        yield record
        at = _skip(text, at)
