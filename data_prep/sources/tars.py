"""Archives of samples (WebDataset tars), read member by member: nothing is unpacked to disk, nothing is unpickled."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from common.files import digest
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import MAX_BYTES

PICKLES = ("pickle", "pkl", "pyd", "pt", "pth")
"""Suffixes of members that WebDataset loaders unpickle, which runs code of the archive's author."""


@dataclass
class Group:
    """The members that share a key, by the rest of their name: `a/b.seg.png` is `seg.png` of key `a/b`.

    Attributes:
        key: As above, with the archive's folders.
        members: Their bytes.
        defect: Where set, why the group cannot be used; its members are then not complete.
        leftovers: Members that macOS adds to every archive (`._NAME`), met since the group before.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    defect: Defect | None = None
    leftovers: int = 0

    def text(self, name: str) -> str:
        """A member as text, without a byte order mark, its lines ended by LF.

        Raises:
            Defect: missing, or not UTF-8.
        """
        if name not in self.members:
            raise Defect("text missing", f"{self.key} has no member .{name}, only {', '.join(self.members)}")
        try:
            return self.members[name].decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise Defect("text is not UTF-8", f"member .{name}: {error}") from error


def find(folder: Path) -> list[Path]:
    """All `.tar` files below `folder`, sorted.

    Raises:
        DataError: there are none.
    """
    if folder.suffix == ".tar" and folder.is_file():
        raise DataError(f"{folder} is one archive; say source.path={folder.parent}, the folder of the archives")
    found = sorted(folder.rglob("*.tar"))
    if not found:
        raise DataError(f"{folder} holds no .tar file (compressed ones have to be unpacked to .tar first)")
    return found


def listing(folder: Path, files: list[Path]) -> str:
    """Digest of names and sizes, as a cheap description of what a folder holds."""
    return digest([[str(file.relative_to(folder)), file.stat().st_size] for file in files])


def groups(file: Path) -> Iterator[Group]:
    """Groups of an archive in its order; one with a defect, named after the archive, where the archive is damaged."""
    current: Group | None = None
    leftovers = 0
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep a record of every member
                if member.isdir():
                    continue
                if _is_leftover(member.name):
                    leftovers += 1
                    continue
                key, _, suffix = PurePosixPath(member.name).name.partition(".")
                key = str(PurePosixPath(member.name).with_name(key)) if key else member.name
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current, leftovers = Group(key, leftovers=leftovers), 0
                suffix = suffix.lower()
                current.defect = current.defect or _refuse(member, suffix, current)
                if current.defect is None:
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file: `_refuse` has seen to that
                    current.members[suffix] = content.read()
            # The library takes a damaged header in the middle for the end.
            archive.fileobj.seek(archive.offset)
            rest = archive.fileobj.read(tarfile.BLOCKSIZE)
            if rest != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark, and no sound header at byte {archive.offset}")
    except (tarfile.TarError, EOFError) as error:
        # Its current group may be cut short.
        detail = f"{file}: {error}; what follows is lost" + (f", from {current.key} on" if current else "")
        yield Group(file.name, defect=Defect("archive damaged", detail))
        return
    if current is not None:
        yield current


def _is_leftover(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts


def _refuse(member: Any, suffix: str, group: Group) -> Defect | None:
    """Why a member is not read."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return Defect("archive member leaves its folder", member.name)
    if not member.isreg() or member.issparse():
        return Defect("archive member is no plain file", member.name)
    if suffix.rpartition(".")[2] in PICKLES:
        return Defect("archive member is a pickle", member.name)
    if member.size > MAX_BYTES:
        return Defect("archive member too large", f"{member.name}: {member.size} bytes, at most {MAX_BYTES}")
    if suffix in group.members:
        return Defect("archive member twice", member.name)
    return None
