"""Files that are whole or absent, and known to be what was written: atomic writes, waiting for the disk, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from common.errors import UserError

_CHECKSUM = "checksum"


class DamagedFile(UserError):
    """A file is missing, or is not what was written."""


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checksum(file: Path) -> str:
    """XXH3-64 of a file's bytes, 16 hex digits: finds accidents at the speed of memory, protects from nobody."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()


def block_checksum(block: memoryview) -> int:
    """XXH3 of bytes in memory, as a number."""
    return xxhash.xxh3_64_intdigest(block)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that was read from a file.

    Raises:
        DamagedFile: it leads out of the folder.
    """
    path = folder / name
    if not name or os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise DamagedFile(f"{folder}: the name {name!r} leads out of this folder and is not followed")
    return path


def seal(folder: Path, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size in bytes and checksum of files of `folder` by relative name (default: all), waiting for each on the disk."""
    sealed = {}
    for name in file_names(folder) if names is None else names:
        file = folder / name
        sync(file)
        sealed[name] = {"size": file.stat().st_size, _CHECKSUM: checksum(file)}
    return sealed


def file_names(folder: Path) -> list[str]:
    """Relative names of all files below `folder`, sorted."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def damage(folder: Path, sealed: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first of the sealed files that is not what was written; None when all are.

    Raises:
        DamagedFile: a name that leads out of the folder.
    """
    for name, record in sealed.items():
        file = inside(folder, name)
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != record["size"]:
            return f"{name} has {size} bytes, {record['size']} were written"
        if checksum(file) != record[_CHECKSUM]:
            return f"{name} is not what was written (its checksum differs)"
    return None


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write `file` atomically, with a checksum of its own for `read_json`."""
    write_atomically(file, sealed_json(value, indent=1))


def sealed_json(value: dict[str, Any], indent: int | None = None) -> str:
    """A JSON object and a line end, with a checksum of its own for `unsealed`."""
    value = json.loads(json.dumps(value))  # as it will be read: keys are texts
    return json.dumps({**value, _CHECKSUM: _xxh3(value)}, indent=indent) + "\n"


def unsealed(text: str) -> tuple[dict[str, Any], bool]:
    """What `sealed_json` made a text of, and whether it had a checksum; one written by hand has none.

    Raises:
        ValueError: it is no JSON object, or not what was written.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is expected, not a {type(value).__name__}")
    written = value.pop(_CHECKSUM, None)
    if written is not None and written != _xxh3(value):
        raise ValueError("its content is not what was written (checksum)")
    return value, written is not None


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """What `write_json` wrote. A file without a checksum, written by hand, is taken as it is.

    Args:
        remedy: What the user can do about a file that cannot be used; ends the message.

    Raises:
        DamagedFile: it is missing, is no JSON object, or is not what was written.
    """
    try:
        return unsealed(read_text(file, remedy))[0]
    except ValueError as error:
        raise DamagedFile(f"{file} is damaged: {error}; {remedy}") from error


def read_records(file: Path, keys: Iterable[str], remedy: str) -> list[dict[str, Any]]:
    """JSON lines, each an object with at least `keys`.

    Args:
        remedy: What the user can do about a file that cannot be used; ends the message.

    Raises:
        DamagedFile: it cannot be read, or a line is something else.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(file, remedy).split("\n"), 1):  # other ends of lines may stand in a text
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DamagedFile(f"{file}, line {number}, is damaged: no JSON ({error}); {remedy}") from error
        if not isinstance(record, dict) or (missing := [key for key in keys if key not in record]):
            what = f"it has no {missing[0]!r}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DamagedFile(f"{file}, line {number}, is damaged: {what}; {remedy}")
        found.append(record)
    return found


def made_before_checksums(file: Path) -> bool:
    """Whether a JSON file is one of release 0.1.0, which wrote no checksums; False where it is missing or no JSON."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and _CHECKSUM not in value


def read_text(file: Path, remedy: str) -> str:
    """A small UTF-8 file.

    Raises:
        DamagedFile: it cannot be read, is empty, or is no text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise DamagedFile(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{file} is damaged: no UTF-8 text; {remedy}") from error
    if not text.strip("\0 \n"):
        raise DamagedFile(f"{file} is empty; {remedy}")
    return text


def read_lines(key: str, file: Path) -> list[str]:
    """The lines of a text file of the user's, the blank ones left out.

    Args:
        key: The key that names the file, for messages.

    Raises:
        UserError: no such file, or no UTF-8 text.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{key}={file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={file}: no UTF-8 text") from error


def write_atomically(file: Path, text: str) -> None:
    """Write `file` so that a reader, or the next boot, sees the old text or the new, never a part.

    The permissions of a file that is there already are kept.
    """
    # A name of its own for each writer: the tasks of a job array may write the same file at the same time.
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            if file.exists():
                os.fchmod(stream.fileno(), file.stat().st_mode & 0o7777)
            stream.write(text)
        sync(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers of `write_atomically` that were killed have left in a folder that nobody writes to now."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_checksum(text: str) -> str:
    """XXH3-64 of a text's UTF-8 bytes, 16 hex digits."""
    return xxhash.xxh3_64(text.encode()).hexdigest()


def _xxh3(value: dict[str, Any]) -> str:
    return text_checksum(json.dumps(value, sort_keys=True))


def share(folder: Path) -> None:
    """Give the files the mode that new files have: safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
