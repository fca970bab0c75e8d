"""Texts and turns of a source, in whatever spelling, to dialogues of the schema."""

from __future__ import annotations

from typing import Any

from data_prep.store.errors import Defect
from data_prep.store.sample import Dialogue

IMAGE_TOKEN = "<image>"
ROLE_NAMES = {"human": "user", "gpt": "assistant"}
"""Names of LLaVA and ShareGPT; the schema's own pass, and others are left for the verifier to name."""


def exchange(user: str, assistant: str) -> Dialogue:
    """One user turn and its answer; a caption has an empty user turn."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def from_turns(turns: Any) -> tuple[Dialogue, int]:
    """A dialogue from `{"from", "value"}` or `{"role", "content"}` turns, and the image tokens taken out of it.

    As in LLaVA, a turn that had a token loses the white space around it too.

    Raises:
        Defect: no list of such turns, or a token in an answer.
    """
    if not isinstance(turns, list):
        raise Defect("conversation is no list", type(turns).__name__)
    dialogue: list[dict[str, Any]] = []  # of anything until the verifier has seen it
    tokens = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Defect("turn is no object", f"turn {number}: {type(turn).__name__}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if isinstance(text, str) and IMAGE_TOKEN in text:
            if role == "assistant":
                raise Defect("image token in an answer", f"turn {number}")
            tokens += text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "").strip()
        dialogue.append({"role": role, "content": text})
    return dialogue, tokens


def from_text_or_turns(value: Any, images: int) -> tuple[Dialogue, int]:
    """A caption or a dialogue, and the image tokens taken out of it.

    Args:
        value: A text, which becomes a caption, or a list of turns.
        images: How many images belong to it; turns have as many tokens or none.

    Raises:
        Defect: neither of these, or another number of tokens.
    """
    if isinstance(value, str):
        tokens = value.count(IMAGE_TOKEN)
        return exchange("", value.replace(IMAGE_TOKEN, "").strip() if tokens else value), tokens
    dialogue, tokens = from_turns(value)
    if tokens:
        check_tokens(tokens, images)
    return dialogue, tokens


def check_tokens(tokens: int, images: int) -> None:
    """There are as many image tokens as images.

    Raises:
        Defect: there are not.
    """
    if tokens != images:
        raise Defect("image tokens differ from images", f"{tokens} tokens, {images} images")
