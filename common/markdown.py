"""Text from data or from a user in a Markdown report: shown as it is, never read as Markdown or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def plain(value: object) -> str:
    """One line of text for a paragraph or a table cell."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def as_table(rows: Sequence[Sequence[object]]) -> str:
    """A table; its first row is the heads. Cells are Markdown: `plain` is the caller's."""
    head, *body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
