"""Texts and turns of a source, in whatever spelling, to dialogues of the schema."""

from __future__ import annotations

from typing import Any

from data_prep.store.errors import Defect
from data_prep.store.sample import Dialogue

IMAGE_TOKEN = "<image>"
BOM = "\ufeff"
"""The byte order mark that some editors put at the beginning of a file."""
ROLE_NAMES = {"human": "user", "gpt": "assistant"}
"""Names of LLaVA and ShareGPT; the schema's own pass, and others are left for the verifier to name."""
PAIRS = (("user", "assistant"), ("question", "answer"))
"""Keys of an exchange in a list of independent ones: the_cauldron's, and the plain ones."""
KNOWN = (
    "a text; a list of texts; a list of turns with from/value or role/content; "
    "a list of exchanges with user/assistant or question/answer"
)


def exchange(user: str, assistant: str) -> Dialogue:
    """One user turn and its answer; a caption has an empty user turn."""
    return [{"role": "user", "content": _clean(user)}, {"role": "assistant", "content": _clean(assistant)}]


def _clean(text: Any) -> Any:
    """A text without a byte order mark; what is no text is left for the verifier to name."""
    return text.removeprefix(BOM) if isinstance(text, str) else text


def _first(turn: dict[str, Any], *names: str) -> Any:
    """The first of some keys that has a value: tables fill the keys of other spellings with nulls."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def from_turns(turns: Any) -> tuple[Dialogue, int]:
    """A dialogue from `{"from", "value"}` or `{"role", "content"}` turns, and the image tokens taken out of it.

    A content may be a list of parts, `{"type": "text", "text"}` and `{"type": "image"}`. As in LLaVA, a turn that had a
    token loses the white space around it too.

    Raises:
        Defect: no list of such turns, or a token in an answer.
    """
    if not isinstance(turns, list):
        raise Defect("conversation is no list", f"found {type(turns).__name__}; known are {KNOWN}")
    dialogue: list[dict[str, Any]] = []  # of anything until the verifier has seen it
    tokens = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Defect("turn is no object", f"turn {number}: {type(turn).__name__}")
        role, text = _first(turn, "from", "role"), _first(turn, "value", "content")
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if isinstance(text, list):
            text = _join_parts(text, number)
        if isinstance(text, str) and IMAGE_TOKEN in text:
            if role == "assistant":
                raise Defect("image token in an answer", f"turn {number}")
            tokens += text.count(IMAGE_TOKEN)
            text = text.replace(IMAGE_TOKEN, "").strip()
        dialogue.append({"role": role, "content": _clean(text)})
    return dialogue, tokens


def _join_parts(parts: list[Any], number: int) -> str:
    """Text of a content in parts, an image token for each image."""
    found = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            found.append(part["text"])
        elif kind in ("image", "image_url"):
            found.append(IMAGE_TOKEN)
        else:
            raise Defect("turn of an unknown part", f"turn {number}: {str(kind or type(part).__name__)[:40]}")
    return "".join(found)


def from_text_or_turns(value: Any, images: int) -> tuple[list[Dialogue], int]:
    """The dialogues of a value, and the image tokens taken out of them.

    Args:
        value: A text or a list of texts, each of which becomes a caption; a list of turns, one dialogue; or a list of
            independent exchanges (the_cauldron's `texts`), a dialogue each.
        images: How many images belong to it; turns have as many tokens or none.

    Raises:
        Defect: none of these, or another number of tokens.
    """
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        tokens = sum(text.count(IMAGE_TOKEN) for text in value)
        plain = [text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text for text in value]
        return [exchange("", text) for text in plain], tokens
    if pairs := _pairs(value):
        read = [from_turns(pair) for pair in pairs]
        return [dialogue for dialogue, _ in read], sum(number for _, number in read)
    dialogue, tokens = from_turns(value)
    if dialogue and all(turn["role"] is None and turn["content"] is None for turn in dialogue):
        keys = ", ".join(sorted({str(key) for turn in value for key in turn}))
        raise Defect("text of unknown shape", f"found a list of objects with {keys}; known are {KNOWN}")
    if tokens:
        check_tokens(tokens, images)
    return [dialogue], tokens


def _pairs(value: Any) -> list[list[dict[str, Any]]]:
    """The turns of each of a list of exchanges; none where it is no such list."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return []
    for user, assistant in PAIRS:
        if all(each.get(user) is not None and each.get(assistant) is not None for each in value):
            return [
                [{"role": "user", "content": each[user]}, {"role": "assistant", "content": each[assistant]}]
                for each in value
            ]
    return []


def check_tokens(tokens: int, images: int) -> None:
    """There are as many image tokens as images.

    Raises:
        Defect: there are not.
    """
    if tokens != images:
        raise Defect("image tokens differ from images", f"{tokens} tokens, {images} images")
