"""JSON files that hold millions of records, read without ever being in memory as a whole.

`boundaries` goes through a file once and cuts it into stretches of records; `read` gives the records of a stretch.
An array of objects (LLaVA's files), JSON Lines, and several of these one after another (`cat a.json b.json`) are read.
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
_BOM = "\xef\xbb\xbf"
_BETWEEN = re.compile(f"(?:[ \\t\\r\\n,]|{_BOM})*")
"""What may stand between records: a byte order mark (here as Latin-1) begins some files."""
_OUTSIDE = re.compile("[ \\t\\r\\n,\ufeff\\[\\]]*")
_WRONG = (ValueError, RecursionError)
"""Raised for malformed JSON, numbers of thousands of digits, and nesting without end."""
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
        if text.startswith(("\xff\xfe", "\xfe\xff")):
            raise DataError(f"{file} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
        array, at, base, count = False, 0, 0, 0  # inside an array; place in `text`; byte of text[0]; records so far
        while True:
            at = _skip(_BETWEEN, text, at)
            if at < len(text) and text[at] != "{" and not _BOM.startswith(text[at:]):  # it may be cut by the chunk
                if text[at] != ("]" if array else "["):
                    raise DataError(
                        f"{file}: byte {base + at}: expected a record in braces, found {text[at : at + 20]!r}"
                    )
                array, at = not array, at + 1
                continue
            error = None
            if at < len(text):
                try:
                    end = _decode(text, at)[1]
                except _WRONG as raised:
                    error = raised
                else:
                    if count % every == 0:
                        found.append(base + at)
                    count, at, last = count + 1, end, base + end
                    continue
            if error and (len(text) - at > MAX_RECORD or not isinstance(error, json.JSONDecodeError)):
                wrong = base + getattr(error, "pos", at)
                raise DataError(f"{file}: byte {wrong}: {getattr(error, 'msg', error)}, in record {count}") from error
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


def _skip(what: re.Pattern[str], text: str, at: int) -> int:
    """Where what may stand between records ends, from `at` on."""
    found = what.match(text, at)
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
    at = _skip(_OUTSIDE, text, 0)
    while at < len(text):
        try:
            record, at = _decode(text, at)
        except _WRONG as error:
            raise DataError(f"{file} has changed while it was read: {error}; prepare the data again") from error
        yield record
        at = _skip(_OUTSIDE, text, at)
