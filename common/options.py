"""Command lines of `key=value` words: the values typed are the values used, and `--help` lists the keys."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import settings
from common.errors import ConfigError

# What Hydra's grammar gives a meaning to: a function of a sweep, a list, a dictionary, a quotation.
_SWEEP = re.compile(r"(choice|range|glob|interval|tag|sort|shuffle)\(.*\)$", re.DOTALL)
_WORDS = ("true", "false", "null", "nan", "inf", "infinity")


def parse_options(schema: type, arguments: list[str], doc: str | None = None) -> Any:
    """An instance of the dataclass `schema` from `key=value` arguments, for the commands that are no Hydra programs.

    A key of text takes the text as it was typed. `--help` prints `doc` and the keys, and ends the program.

    Args:
        schema: A dataclass of plain values; what they may hold is declared with `common.settings.setting`.
        arguments: Words of the command line.
        doc: Documentation of the command.

    Raises:
        ConfigError: unknown key (with the nearest one), a wrong type or value, or no value for a key that needs one.
    """
    if {"--help", "-h"} & set(arguments):
        print(f"{(doc or '').strip()}\n\n{help_text(schema)}")
        sys.exit(0)
    known = {name: kind for name, kind, _, _ in settings.keys(schema)}
    given: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word}: write key=value; keys: {', '.join(known)} (--help tells more)")
        if key not in known:
            raise unknown_key(key, list(known))
        if key in given:
            raise ConfigError(f"{key} is given twice")
        given[key] = _read(key, text, known[key])
    return typed(schema, _nested(given))


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as dictionaries in dictionaries."""
    tree: dict[str, Any] = {}
    for key, value in given.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def typed(schema: type, tree: dict[str, Any]) -> Any:
    """An instance of the dataclass `schema` from plain containers, its values of the declared types and checked.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type or value, or none for a key that needs one.
    """
    _check_shapes(schema, tree, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), tree)
        OmegaConf.resolve(merged)
        value = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain(error, [name for name, *_ in settings.keys(schema)]) from error
    settings.check(value)
    return value


def _check_shapes(schema: type, tree: dict[str, Any], prefix: str) -> None:
    """What OmegaConf takes, or names no key for: numbers as flags, no path, lists, unknown keys in their elements."""
    kinds = typing.get_type_hints(schema)
    for name, value in tree.items():
        kind, key = kinds.get(str(name)), f"{prefix}{name}"
        if is_dataclass(kind) and isinstance(value, dict):
            _check_shapes(typing.cast(type, kind), value, f"{key}.")
        if bool in _kinds(kind) and isinstance(value, int) and value not in (0, 1):
            raise ConfigError(f"{key}={value}: write true or false")
        if Path in _kinds(kind) and value == "":  # to pathlib, the current folder
            raise ConfigError(f"{key}='': must not be empty")
        if (
            isinstance(value, list)
            and get_origin(kind) is not list
            and dict in [get_origin(each) for each in _kinds(kind)]
        ):
            raise ConfigError(f"{key}={value}: give a mapping: {key}={{...}}")
        of = next((get_args(each)[0] for each in _kinds(kind) if get_origin(each) is list), None)
        if of is None or value is None or isinstance(value, str) and "${" in value:
            continue
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value}: give a list: {key}=[...]")
        for number, element in enumerate(value):
            if is_dataclass(of) != isinstance(element, dict) or isinstance(element, list) or element is None:
                wanted = f"keys {', '.join(each.name for each in fields(of))}" if is_dataclass(of) else "one value"
                raise ConfigError(f"{key}[{number}]={element}: give {wanted}")
            if is_dataclass(of):
                names = [each.name for each in fields(of)]
                if unknown := [each for each in element if each not in names]:
                    raise unknown_key(f"{key}[{number}].{unknown[0]}", [f"{key}[{number}].{each}" for each in names])


def as_typed(overrides: list[str], schema: type, multirun: bool = False) -> list[str]:
    """Hydra overrides in which the values of text keys are quoted, so that Hydra takes them as they stand.

    Otherwise its grammar reads `name=20240101_120000` as a number, and stumbles over `=`, `(`, `#` or an accent in a
    path. Values that are quoted already, null, and sweeps of several values stay as they are. An element of a list of
    dataclasses may be given by its first key alone: `data.train=[A,B]`.

    Args:
        overrides: Words of the command line.
        schema: The dataclass of the configuration.
        multirun: Whether `a,b` means two runs.
    """
    kinds = {name: kind for name, kind, _, _ in settings.keys(schema)}
    out = []
    for word in overrides:
        key, equals, value = word.partition("=")
        kind = kinds.get(key.lstrip("+"))
        if not equals or not value or kind is None or value == "null" and type(None) in _kinds(kind):
            out.append(word)
        elif str in _kinds(kind):
            several = multirun and "," in value and not _quoted(value)
            sweep = multirun and _SWEEP.match(value)
            out.append(word if sweep else f"{key}={','.join(map(_quote, value.split(',') if several else [value]))}")
        elif kind is Any and not multirun and re.fullmatch(r"[^\[\]{}'\"]+,[^\[\]{}'\"]+", value):
            out.append(f"{key}={_quote(value)}")
        elif get_origin(kind) is list and not re.search(r"[{}'\"]|^\[.*[\[\]].*\]$", value):
            elements = [_quote(part.strip()) for part in value.strip("[]").split(",") if part.strip()]
            (of,) = get_args(kind)
            if is_dataclass(of):
                elements = [f"{{{fields(of)[0].name}:{element}}}" for element in elements]
            out.append(f"{key}=[{','.join(elements)}]" if of is str or is_dataclass(of) else word)
        else:
            out.append(word)
    return out


def load_yaml(text: str) -> Any:
    """YAML as OmegaConf reads it, but without anchors: a few lines of aliases can stand for more than memory holds.

    Raises:
        ConfigError: no YAML, or an anchor or alias in it.
    """
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
                raise ConfigError(f"YAML anchors and aliases (&{token.value}) are not taken; write the value itself")
        return OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(f"no readable YAML: {' '.join(str(error).split())[:200]}") from error


def explain(error: Exception, known: list[str]) -> ConfigError:
    """Hydra's or OmegaConf's complaint as one line that names the key and the nearest of the known ones."""
    text = str(error.__cause__ or error)
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if match := re.search(r"(?:full_key: |[Kk]ey ')([\w.\[\]]+)", text):
        key = key or match.group(1)
    first = text.strip().splitlines()[0]
    if match := re.search(r"Ambiguous value for argument '(.+)'", str(error)):
        return ConfigError(f"{match[1]}: several values are a sweep, which wants -m in front of it")
    if word := getattr(error, "override", None):
        name = word.partition("=")[0]
        return ConfigError(
            f"{word} cannot be read; quote text in it for Hydra, and the whole for the shell: "
            f""""{name}='TEXT'", or "{name}=[{{path: 'TEXT'}}]" """.strip()
        )
    if match := re.search(r"Could not find '(\w+)/(.+)'", str(error)):
        known = re.findall(r"^\t(\S+)$", str(error), re.MULTILINE)
        near = difflib.get_close_matches(match[2], known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        there = f"there are {', '.join(known)}{hint}" if known else "--help lists them"
        return ConfigError(f"{match[1]}={match[2]}: no such preset; {there}")
    if key and key not in known and ("not in" in text or "Missing key" in text):
        return unknown_key(key, known)
    if "Missing mandatory value" in text or "MissingMandatoryValue" in type(error).__name__:
        return ConfigError(f"configuration key `{key}` has no value; set it on the command line: {key}=...")
    return ConfigError(f"configuration key `{key}`: {first}" if key else first)


def unknown_key(key: str, known: list[str]) -> ConfigError:
    """The error that says which of the known keys was probably meant."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return ConfigError(f"unknown configuration key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def help_text(schema: type) -> str:
    """The keys of a dataclass, one a line: default, what it may hold, documentation."""
    lines, defaults = ["keys:"], _defaults(schema, "")
    for name, kind, allowed, doc in settings.keys(schema):
        if name in defaults and not is_dataclass(kind):
            value = "needed" if defaults[name] in (MISSING, "???") else settings.shown(defaults[name])
            lines.append(f"  {name} ({value}{f'; {allowed}' if str(allowed) else ''})")
            lines += textwrap.wrap(doc, 120, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _defaults(schema: type, prefix: str) -> dict[str, Any]:
    """Every dotted key's default."""
    found: dict[str, Any] = {}
    kinds = typing.get_type_hints(schema)
    for each in fields(schema):
        if is_dataclass(kind := kinds[each.name]):
            found |= _defaults(typing.cast(type, kind), f"{prefix}{each.name}.")
        elif callable(each.default_factory):
            found[prefix + each.name] = each.default_factory()
        else:
            found[prefix + each.name] = each.default
    return found


def _read(key: str, text: str, kind: Any) -> Any:
    """A value as its key's type wants it."""
    if text == "null" and type(None) in _kinds(kind):
        return None
    if _kinds(kind) - {type(None)} <= {str}:
        return text
    try:
        tree = load_yaml(f"value: {text}")
    except ConfigError as error:
        raise ConfigError(f"{key}={text}: {error}") from error
    if list(tree) != ["value"]:
        raise ConfigError(f"{key}={text}: more than one value")
    return tree["value"]


def _kinds(kind: Any) -> set[Any]:
    """The members of a union, or the type alone."""
    return set(get_args(kind)) if get_origin(kind) in (typing.Union, types.UnionType) else {kind}


def _quoted(value: str) -> bool:
    return len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]


def _quote(value: str) -> str:
    """In quotes, unless it is quoted or Hydra reads it as text anyway."""
    plain = re.fullmatch(r"(\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*|/", value) and value.lower() not in _WORDS
    if plain or _quoted(value):
        return value
    # A backslash escapes only a quotation mark, so that those right before one, or at the end, have to be doubled.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"
