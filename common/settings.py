"""What a configuration key may hold: said once, next to the key, and checked for a whole tree of dataclasses."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.errors import ConfigError

_LONGEST = 4096


@dataclass(frozen=True)
class Allowed:
    """What a key may hold.

    Attributes:
        within: An interval of numbers in mathematical notation, `[0, 1)`: 0 belongs to it, 1 does not.
        choices: The only values.
        path: Whether it is a file or folder; a leading `~` is the home folder.
        empty: Whether a text may be empty.
    """

    within: str | None = None
    choices: tuple[Any, ...] | None = None
    path: bool = False
    empty: bool = False

    def __str__(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(shown(choice) for choice in self.choices)
        if self.within is None:
            return ""
        low, high, above, below = _bounds(self.within)
        first = f"{'above' if above else 'at least'} {low}"
        return first if high == "inf" else f"{first} and {'below' if below else 'at most'} {high}"


def setting(
    default: Any = MISSING,
    *,
    within: str | None = None,
    choices: tuple[Any, ...] | Callable[[], tuple[Any, ...]] | None = None,
    path: bool = False,
    empty: bool = False,
    factory: Any = MISSING,
) -> Any:
    """A dataclass field that says what it may hold; null is allowed by its type (`int | None`).

    Args:
        default: Its default.
        within: See `Allowed`; for a list, of each of its values.
        choices: See `Allowed`; or a function that gives them, where they stand in a module that reads this one.
        path, empty: See `Allowed`.
        factory: Makes the default, where it is a list.
    """
    allowed = {"within": within, "choices": choices, "path": path, "empty": empty}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=allowed)
    return field(default=default, metadata=allowed)


def allowed(key: Field) -> Allowed:
    """What was said about a field."""
    said: dict[str, Any] = dict(key.metadata)
    if callable(choices := said.get("choices")):
        said["choices"] = choices()
    return Allowed(**said)


def check(config: Any, prefix: str = "") -> None:
    """Check every value of a dataclass and of those in it, then what each says in a method `check(prefix)` of its own.

    Also expands `~` in paths, in place.

    Args:
        config: The dataclass.
        prefix: Its place in the whole, with a final dot, for messages.

    Raises:
        ConfigError: names key, value and what is allowed.
    """
    for key in fields(config):
        value, name, rule = getattr(config, key.name), prefix + key.name, allowed(key)
        if isinstance(value, list):
            for number, element in enumerate(value):
                if is_dataclass(element):
                    check(element, f"{name}[{number}].")
                else:
                    _check_value(f"{name}[{number}]", element, rule)
        elif is_dataclass(value):
            check(value, f"{name}.")
        elif value is not None or rule.choices and None not in rule.choices and not _optional(type(config), key.name):
            _check_value(name, value, rule)
        if rule.path and isinstance(value, str | Path) and str(value).startswith("~"):
            setattr(config, key.name, type(value)(Path(value).expanduser()))
    if callable(own := getattr(config, "check", None)):
        own(prefix)


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ConfigError: names the choices, and the one that is nearest.
    """
    if any(value == choice and type(value) is type(choice) for choice in choices):  # 1 is not true
        return
    known = [shown(choice) for choice in choices]
    near = difflib.get_close_matches(shown(value), known, n=1)
    raise ConfigError(
        f"{name}={shown(value)}: choose one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
    )


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any, Allowed, str]]:
    """Every dotted key of a tree of dataclasses, depth first: name, type, what it may hold, documentation.

    The keys of a list's elements are named `LIST[].KEY`.
    """
    types, docs = get_type_hints(schema), documentation(schema)
    for key in fields(schema):
        name, kind = prefix + key.name, types[key.name]
        yield name, kind, allowed(key), docs.get(key.name, "")
        if is_dataclass(kind):
            yield from keys(kind, f"{name}.")
        elif get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
            yield from keys(get_args(kind)[0], f"{name}[].")


def documentation(schema: type) -> dict[str, str]:
    """What the section `Attributes` of a dataclass's docstring, or of one it is made from, says about each key."""
    found: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        body = inspect.cleandoc(each.__doc__ or "").partition("\nAttributes:\n")[2]
        for entry in re.split(r"\n(?= {4}\S)", re.split(r"\n(?=\S)", body)[0]):
            names, colon, meaning = " ".join(entry.split()).partition(": ")
            if colon:
                found |= dict.fromkeys(names.split(", "), meaning)
    return found


def _check_value(name: str, value: Any, rule: Allowed) -> None:
    if rule.choices is not None:
        one_of(name, value, rule.choices)
    elif isinstance(value, str | Path):
        _check_text(name, str(value), rule)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if rule.within is None:
            if not math.isfinite(value):
                raise ConfigError(f"{name}={value}: must be a finite number")
            return
        low, high, above, below = _bounds(rule.within)
        inside = float(low) < value if above else float(low) <= value
        if not (inside and (value < float(high) if below else value <= float(high))):
            raise ConfigError(f"{name}={value}: must be {rule}")


def _check_text(name: str, value: str, rule: Allowed) -> None:
    if not (value.strip() or rule.empty and not value):
        raise ConfigError(f"{name}='': must not be empty")
    if len(value) > _LONGEST:
        raise ConfigError(f"{name}={value[:40]}...: longer than {_LONGEST} characters")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ConfigError(f"{name}={value!r}: holds a control character or a broken one; write printable text")


def _bounds(within: str) -> tuple[str, str, bool, bool]:
    """Lower and upper bound as written, and whether each of them is outside."""
    low, high = within[1:-1].split(", ")
    return low, high, within[0] == "(", within[-1] == ")"


def _optional(schema: type, name: str) -> bool:
    return type(None) in get_args(get_type_hints(schema)[name])


def shown(value: Any) -> str:
    """As YAML and the command line write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
