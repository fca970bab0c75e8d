"""The Python that README.md and docs/use.md show is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.vlora.conftest import square

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_the_lines_that_are_shown_work(page, trained, tmp_path, monkeypatch, capsys):
    blocks = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if "vlora" in b]
    assert len(blocks) == 1 and len([line for line in blocks[0].splitlines() if line]) <= 10
    (tmp_path / "picture.png").write_bytes(square((220, 20, 20)))
    monkeypatch.chdir(tmp_path)
    code = re.sub(r'"outputs/[^"]*"', repr(str(trained)), blocks[0])
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.strip()
