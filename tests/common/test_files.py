"""Files that are whole or absent, and known to be what was written."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from common.files import (
    DamagedFile,
    damage,
    inside,
    read_json,
    read_records,
    remove_temporaries,
    seal,
    write_atomically,
    write_json,
)
from common.markdown import plain

ROOT = Path(__file__).resolve().parents[2]
VALUE = {"steps": 12, "name": "é", "nested": {"2": [1.5, None], "10": float("inf")}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {**VALUE, "numbers": {2: "b", 10: "a"}})
    assert read_json(tmp_path / "a.json", "-") == {**VALUE, "numbers": {"2": "b", "10": "a"}}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, VALUE)
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            try:
                found = read_json(file, "make it again")
            except DamagedFile as error:
                assert str(file) in str(error) and "make it again" in str(error)
            else:
                assert {k: found.get(k) for k in VALUE} == VALUE  # white space, or the checksum's own name


@pytest.mark.parametrize("content", [None, b"", b"\0" * 40, b"[1, 2]", b'{"a": 1', b"\x89PNG\r\n\xff\xfe", "folder"])
def test_other_content_is_named_with_its_remedy(tmp_path: Path, content: bytes | str | None) -> None:
    file = tmp_path / "a.json"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a\.json .*; make it again"):
        read_json(file, "make it again")


def test_sealed_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"12345")
    sealed = seal(tmp_path)
    assert list(sealed) == ["sub/x"] and damage(tmp_path, sealed) is None
    (tmp_path / "sub" / "x").write_bytes(b"12346")
    assert "sub/x is not what was written" in str(damage(tmp_path, sealed))
    (tmp_path / "sub" / "x").write_bytes(b"1234")
    assert "sub/x has 4 bytes, 5 were written" in str(damage(tmp_path, sealed))
    (tmp_path / "sub" / "x").unlink()
    assert "sub/x is missing" in str(damage(tmp_path, sealed))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x", ""])
def test_a_name_from_a_file_does_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(DamagedFile, match="leads out of this folder"):
        inside(folder, name)
    assert inside(folder, "a/b") == folder / "a/b"


def test_permissions_of_a_file_are_kept(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "1")
    os.chmod(tmp_path / "a", 0o640)
    write_atomically(tmp_path / "a", "2")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.json.0123456789abcdef0123456789abcdef", "a.json", ".errors"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".errors", "a.json"]


def test_text_in_a_report_is_neither_markdown_nor_html() -> None:
    assert plain("<img src=x onerror=y>|a\nb`c`[d](e)") == r"&lt;img src=x onerror=y&gt;\|a b\`c\`\[d\](e)"


def test_every_text_file_is_opened_as_utf8() -> None:
    """Not in the locale's encoding; whoever imports us (a notebook) may have another than our commands."""
    found = []
    for package in ("common", "model", "data_prep", "vlora", "train", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            calls = [
                node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            found += [f"{file}:{call.lineno}" for call in calls if _opens_text(call)]
    assert found == []


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens a text file without its encoding. `x.open()` without a mode may be another's method."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if any(word.arg == "encoding" for word in call.keywords) or ast.unparse(owner or call.func) in _NO_TEXT:
        return False
    modes = [part.value for part in [*call.args, *(w.value for w in call.keywords)] if isinstance(part, ast.Constant)]
    texts = [mode for mode in modes if isinstance(mode, str)]
    if name == "open":
        return (bool(texts) or owner is None) and not any("b" in mode for mode in texts)
    return owner is not None and name in ("read_text", "write_text")


_NO_TEXT = {"os", "Image", "tarfile", "zipfile"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[]", "a list"),
        ("7", "a int"),
        ('{"answer": "b"}', "it has no 'question'"),
        ("\0", "no JSON"),
    ],
)
def test_a_damaged_record_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "records.jsonl"
    sound = '{"question": "a\u2028b", "answer": "c"}'
    file.write_text(f"{sound}\n\n{sound}\n", encoding="utf-8")
    assert read_records(file, ["question"], "make it again") == [{"question": "a\u2028b", "answer": "c"}] * 2
    file.write_text(f"{sound}\n{line}\n", encoding="utf-8")
    with pytest.raises(DamagedFile, match=f"records.jsonl, line 2, is damaged: .*{said}.*; make it again"):
        read_records(file, ["question"], "make it again")
