"""Every key of every configuration with wrong values: one line that names key, value and what is allowed.

A value that is taken lies inside what the key's field declares; so no key can be forgotten, and none can take a value
that nobody has thought of.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any, get_args, get_origin

import pytest

from common import settings
from common.errors import ConfigError, UserError
from common.options import parse_options, typed
from data_prep.prepare import Options as PrepareOptions
from train import adapter, evaluate, report
from train.config import RunConfig

NUMBERS = [0, -1, 1.5, math.nan, math.inf, -math.inf, 1e20, 10**20, "text", "", [1, 2], [], {}, {"a": 1}, True, None]
TEXTS = ["", "  ", "a\x00b", "a\nb", "\ud800", "x" * 5000, [1, 2], {"a": 1}, None]
FLAGS = ["perhaps", 1.5, math.nan, [True], {}, "", None]
KEYS = {name: (kind, allowed, doc) for name, kind, allowed, doc in settings.keys(RunConfig) if not is_dataclass(kind)}
COMMANDS = {
    "evaluate": evaluate.Options,
    "report": report.Options,
    "adapter": adapter.Options,
    "data_prep": PrepareOptions,
}


def members(kind: Any) -> set[Any]:
    return set(get_args(kind)) if get_origin(kind) in (typing.Union, types.UnionType) else {kind}


@cache
def alone(group: str) -> type:
    """A configuration with one group of `RunConfig` only, which is quicker to make; or with its own keys only."""
    hints = typing.get_type_hints(RunConfig)
    kept = [f for f in fields(RunConfig) if (f.name == group if group else not is_dataclass(hints[f.name]))]
    return make_dataclass(
        "One",
        [
            (f.name, hints[f.name], field(default=f.default, metadata=f.metadata))
            if f.default is not MISSING
            else (f.name, hints[f.name], field(default_factory=typing.cast(typing.Any, f.default_factory)))
            for f in kept
        ],
    )


def with_value(key: str, value: Any) -> Any:
    """The defaults of a group with one value put in, as a program would put it, past Hydra's grammar."""
    group = key.partition(".")[0] if "." in key else ""
    tree: Any = {"llm": {"path": "a"}, "vision": {"path": "a"}, "data": {"train": [{"path": "a"}]}}
    tree = {name: node for name, node in tree.items() if name == group}
    node, *path = [tree, *key.replace("[]", ".0").split(".")]
    for part in path[:-1]:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[path[-1]] = value
    return typed(alone(group), tree)


def taken(config: Any, key: str) -> Any:
    value: Any = config
    for part in key.replace("[]", ".0").split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value


def refused(key: str, value: Any) -> bool:
    """Whether it is, in the one right way; else what was taken is inside what the key declares."""
    _, allowed, _ = KEYS[key]
    try:
        config = with_value(key, value)
    except UserError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 400, said
        assert key.replace("[]", "[0]") in said or key.rpartition(".")[2] in said, f"{key} is not named: {said}"
        return True
    got = taken(config, key)
    for one in got if isinstance(got, list) else [got]:
        settings._check_value(key, one, allowed) if one is not None else None
    return False


@pytest.mark.parametrize("group", sorted({key.split(".")[0] for key in KEYS}))
def test_numbers(group: str) -> None:
    for key, (kind, allowed, doc) in KEYS.items():
        numeric = {int, float} & members(kind) or get_args(kind) in ((int,), (float,))
        if key.split(".")[0] != group or not numeric:
            continue
        assert allowed.within or allowed.choices, f"{key} states no range"
        assert doc, f"{key} has no documentation"
        for value in NUMBERS:
            was_refused = refused(key, value)
            listed = get_origin(kind) is list or list in {get_origin(member) for member in members(kind)}
            wrong = isinstance(value, str | dict) or isinstance(value, float) and not math.isfinite(value)
            wrong |= isinstance(value, list) != listed and value is not None or isinstance(value, bool)
            wrong |= value in (1e20, 10**20) or value is None and type(None) not in members(kind)
            assert was_refused or not wrong, f"{key}={value!r} was taken"


@pytest.mark.parametrize("key", [key for key, (_, allowed, _) in KEYS.items() if allowed.choices])
def test_choices(key: str) -> None:
    allowed = KEYS[key][1]
    for choice in allowed.choices or ():
        wrong = f"{choice}x"
        with pytest.raises(UserError) as caught:
            with_value(key, wrong)
        said = str(caught.value)
        assert wrong in said and key in said and "\n" not in said
        if str in members(KEYS[key][0]):
            assert said.startswith(f"{key}={wrong}: choose one of ") and f"did you mean {choice}?" in said
    for value in ([1], {"a": 1}, math.nan, ""):
        assert refused(key, value), f"{key}={value!r} was taken"


def test_flags() -> None:
    for key, (kind, _, doc) in KEYS.items():
        if bool in members(kind):
            assert doc, f"{key} has no documentation"
            for value in FLAGS:
                assert refused(key, value) or value is None and type(None) in members(kind), f"{key}={value!r}"


def test_texts() -> None:
    for key, (kind, allowed, doc) in KEYS.items():
        if str in members(kind) and not allowed.choices:
            assert doc, f"{key} has no documentation"
            for value in TEXTS:
                assert refused(key, value) or value is None and type(None) in members(kind), f"{key}={value!r}"


def test_lists_of_text() -> None:
    for key, (kind, _, _) in KEYS.items():
        if get_args(kind) == (str,):
            for value in (["a\x00"], [""], [[1]], "text", 5, {}, None, [None]):
                assert refused(key, value), f"{key}={value!r}"


def test_sources_and_other_shapes() -> None:
    for value in ("text", 5, [], [5], [{}], [{"path": "a", "wieght": 1}], {"path": "a"}, None, [None]):
        assert refused("data.train", value), value
    for key in ("llm.architecture", "vision.architecture"):
        for value in (5, "llama", [1], {}, {"hidden_size": 3}, {"model_type": 5}):
            assert refused(key, value), f"{key}={value!r}"
    for value in (0, 1.5, math.nan, "qx", "", [], ["q", "q"], [1], {}, None, True):
        assert refused("generator.types", value), value


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_commands(command: str) -> None:
    schema = COMMANDS[command]
    needed = [f"{name}=x" for name in ("run", "image", "out") if name in {key for key, *_ in settings.keys(schema)}]
    for key, kind, allowed, doc in settings.keys(schema):
        assert doc, f"{command} {key} has no documentation"
        numeric = {int, float} & members(kind)
        if numeric or allowed.choices:
            assert allowed.within or allowed.choices, f"{command} {key} states no range"
            words = [word for word in needed if not word.startswith(f"{key}=")]
            for value in ("nan", ".inf", "1e20", "text", "[1, 2]", "{a: 1}", "'", "&a 1", "-1", "true"):
                with pytest.raises(ConfigError, match=key) as caught:
                    parse_options(schema, [*words, f"{key}={value}"])
                assert "\n" not in str(caught.value)
