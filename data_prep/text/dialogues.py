"""Texts and turns of a source, in whatever spelling, to dialogues of the schema."""

from __future__ import annotations

import re
from collections.abc import Sequence
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


def without_tokens(dialogue: Dialogue) -> Dialogue:
    """The dialogue without image tokens; as in LLaVA, a turn that had one loses the white space around it too."""
    return [
        {**turn, "content": turn["content"].replace(IMAGE_TOKEN, "").strip()} if _tokens([turn]) else turn
        for turn in dialogue
    ]


def placed_images(dialogue: Dialogue) -> int:
    """Image tokens in what the user says."""
    return _tokens([turn for turn in dialogue if turn["role"] == "user"])


def _tokens(turns: list[dict[str, Any]]) -> int:
    said = [turn["content"] for turn in turns if turn["role"] != "assistant" and isinstance(turn["content"], str)]
    return sum(text.count(IMAGE_TOKEN) for text in said)


def says_where(dialogue: Dialogue, images: int) -> bool:
    """Whether the image tokens of a dialogue tell where its images stand.

    One image stands in front of the first question without being told: LLaVA puts it there wherever its token was in
    that turn. Several images, or one of a later turn, stand where the source says.
    """
    first = next((turn for turn in dialogue if turn["role"] == "user"), None)
    told = images > 1 or images == 1 and first is not None and not _tokens([first])
    return told and images == placed_images(dialogue) == _tokens(dialogue)


def settle(dialogue: Dialogue, images: int) -> tuple[Dialogue, int]:
    """The dialogue with image tokens that say where its images stand, and how many others were taken out of it.

    White space between images at the beginning of a turn, and behind them, goes: without visual tokens it would be an
    empty line.
    """
    if not says_where(dialogue, images):
        return without_tokens(dialogue), _tokens(dialogue)
    return [{**turn, "content": _LEADING.sub(_squeeze, turn["content"]).rstrip()} for turn in dialogue], 0


_LEADING = re.compile(rf"^\s*(?:{IMAGE_TOKEN}\s*)+")


def _squeeze(match: re.Match[str]) -> str:
    return IMAGE_TOKEN * match.group().count(IMAGE_TOKEN)


def from_parts(said: Sequence[tuple[str, Sequence[str | None]]]) -> Dialogue:
    """A dialogue of turns given as role and parts, None for an image, with image tokens where they say something.

    An image stands directly behind what is before it.
    """
    placed = [{"role": role, "content": _placed(parts)} for role, parts in said]
    if says_where(placed, sum(part is None for _, parts in said for part in parts)):
        return placed
    return [{"role": role, "content": text_of(parts)} for role, parts in said]


def text_of(parts: Sequence[str | None]) -> str:
    """The texts of a turn given in parts, lines of their own."""
    return "\n".join(part for part in parts if part is not None)


def _placed(parts: Sequence[str | None]) -> str:
    placed = ""
    for number, part in enumerate(parts):
        placed += IMAGE_TOKEN if part is None else "\n" * any(p is not None for p in parts[:number]) + part
    return placed


def from_turns(turns: Any, images: int, strict: bool = True) -> tuple[Dialogue, int]:
    """A dialogue from `{"from", "value"}` or `{"role", "content"}` turns, and how many image tokens were taken out.

    Args:
        turns: A content may be a list of parts, `{"type": "text", "text"}` and `{"type": "image"}`.
        images: How many images belong to it.
        strict: Whether it has to have as many tokens as images; else it may have none, and others are taken out.

    Raises:
        Defect: no list of such turns, a token in an answer, or another number of tokens.
    """
    if not isinstance(turns, list):
        raise Defect("conversation is no list", f"found {type(turns).__name__}; known are {KNOWN}")
    dialogue: list[dict[str, Any]] = []  # of anything until the verifier has seen it
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Defect("turn is no object", f"turn {number}: {type(turn).__name__}")
        role, text = _first(turn, "from", "role"), _first(turn, "value", "content")
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if isinstance(text, list):
            text = _join_parts(text, number)
        if role == "assistant" and isinstance(text, str) and IMAGE_TOKEN in text:
            raise Defect("image token in an answer", f"turn {number}")
        dialogue.append({"role": role, "content": _clean(text)})
    tokens = _tokens(dialogue)
    if strict and tokens != images:
        raise _differ(tokens, images)
    return settle(dialogue, images)


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
        read = [from_turns(pair, images, strict=False) for pair in pairs]
        return [dialogue for dialogue, _ in read], sum(number for _, number in read)
    dialogue, taken = from_turns(value, images, strict=False)
    if dialogue and all(turn["role"] is None and turn["content"] is None for turn in dialogue):
        keys = ", ".join(sorted({str(key) for turn in value for key in turn}))
        raise Defect("text of unknown shape", f"found a list of objects with {keys}; known are {KNOWN}")
    if taken not in (0, images):
        raise _differ(taken, images)
    return [dialogue], taken


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


def _differ(tokens: int, images: int) -> Defect:
    return Defect("image tokens differ from images", f"{tokens} tokens, {images} images")
