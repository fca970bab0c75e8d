"""Every key of every configuration and command with wrong values: one line that names key, value and what is allowed.

A value that is taken lies inside what the key's field declares; so no key can be forgotten, and none can take a value
that nobody has thought of.
"""

from __future__ import annotations

import importlib
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from common import settings
from common.errors import ConfigError, UserError
from common.options import parse_options, typed
from data_prep import config as preparation
from tests.train.world import ROOT
from train.cluster.sweep import SlurmLauncherConfig
from train.config import RunConfig

NUMBERS = [0, -1, 1.5, math.nan, math.inf, -math.inf, 1e20, 10**20, "text", "", [1, 2], [], {}, {"a": 1}, True, None]
TEXTS = ["", "  ", "a\x00b", "a\nb", "\ud800", "x" * 5000, [1, 2], {"a": 1}, None]
FLAGS = ["perhaps", -1, 5, 1.5, math.nan, [True], {}, "", None]


def commands() -> dict[str, type]:
    """The keys of each command that takes `key=value` words, found in the source."""
    found = {}
    for folder in ("train", "serve", "data_prep", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "parse_options(Options, " in file.read_text():
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                found[module] = importlib.import_module(module).Options
    return found


def groups(schema: type) -> Iterator[tuple[str, type]]:
    """The groups of a configuration, each alone (which is quicker to make), and its own keys."""
    hints = typing.get_type_hints(schema)
    for group in ["", *(f.name for f in fields(schema) if is_dataclass(hints[f.name]))]:
        kept = [f for f in fields(schema) if (f.name == group if group else not is_dataclass(hints[f.name]))]
        parts = []
        for f in kept:
            new = field(default=f.default) if f.default_factory is MISSING else field(default_factory=f.default_factory)
            new.metadata = f.metadata
            parts.append((f.name, hints[f.name], new))
        yield group, make_dataclass("One", parts, namespace={"__doc__": schema.__doc__})


COMMANDS = commands()
SCHEMAS: dict[str, type] = {f"train {group}": schema for group, schema in groups(RunConfig)}
SCHEMAS |= {f"data_prep source={name}": preparation.schema_of(name) for name in preparation.SOURCES}
SCHEMAS |= {"hydra.launcher": SlurmLauncherConfig} | COMMANDS
Key = tuple[str, Any, settings.Allowed, str]


def members(kind: Any) -> set[Any]:
    return set(get_args(kind)) if get_origin(kind) in (typing.Union, types.UnionType) else {kind}


def keys(schema: type) -> list[Key]:
    return [key for key in settings.keys(schema) if not is_dataclass(key[1]) and not key[0].startswith("_")]


def needed(schema: type) -> dict[str, Any]:
    """What has to be given, as a tree."""
    hints, tree = typing.get_type_hints(schema), {}
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            tree[f.name] = needed(hints[f.name])
        elif get_origin(hints[f.name]) is list and is_dataclass(get_args(hints[f.name])[0]):
            tree[f.name] = [needed(get_args(hints[f.name])[0])]
        elif f.default in (MISSING, "???") and f.default_factory is MISSING:
            tree[f.name] = "x"
    return tree


def with_value(schema: type, key: str, value: Any) -> Any:
    """The defaults of a schema with one value put in, as a program would put it, past Hydra's grammar."""
    tree = needed(schema)
    node: Any = tree
    *path, last = key.replace("[]", ".0").split(".")
    for part in path:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return typed(schema, tree)


def taken(config: Any, key: str) -> Any:
    value: Any = config
    for part in key.replace("[]", ".0").split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value


def refused(schema: type, key: Key, value: Any) -> bool:
    """Whether it is, in the one right way; else what was taken is inside what the key declares."""
    name, _, allowed, _ = key
    try:
        config = with_value(schema, name, value)
    except UserError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 400, said
        assert name.replace("[]", "[0]") in said or name.rpartition(".")[2] in said, f"{name} is not named: {said}"
        return True
    got = taken(config, name)
    for one in got if isinstance(got, list) else [got]:
        settings._check_value(name, one, allowed) if one is not None else None
    return False


@pytest.mark.parametrize("name", SCHEMAS)
def test_numbers(name: str) -> None:
    for key in keys(SCHEMAS[name]):
        label, kind, allowed, _ = key
        if not ({int, float} & members(kind) or get_args(kind) in ((int,), (float,))):
            continue
        assert allowed.within or allowed.choices, f"{name} {label} states no range"
        for value in NUMBERS:
            was_refused = refused(SCHEMAS[name], key, value)
            listed = get_origin(kind) is list or list in {get_origin(member) for member in members(kind)}
            wrong = isinstance(value, str | dict) or isinstance(value, float) and not math.isfinite(value)
            wrong |= isinstance(value, list) != listed and value is not None or isinstance(value, bool)
            wrong |= value in (1e20, 10**20) or value is None and type(None) not in members(kind)
            assert was_refused or not wrong, f"{name} {label}={value!r} was taken"


@pytest.mark.parametrize("name", SCHEMAS)
def test_choices(name: str) -> None:
    for key in keys(SCHEMAS[name]):
        label, kind, allowed, _ = key
        for choice in allowed.choices or ():
            wrong = f"{choice}x"
            with pytest.raises(UserError) as caught:
                with_value(SCHEMAS[name], label, wrong)
            said = str(caught.value)
            assert wrong in said and label in said and "\n" not in said
            if str in members(kind) and choice is not None:
                assert said.startswith(f"{label}={wrong}: choose one of ") and f"did you mean {choice}?" in said
        for value in ([1], {"a": 1}, math.nan, "") if allowed.choices else ():
            assert refused(SCHEMAS[name], key, value), f"{label}={value!r} was taken"


@pytest.mark.parametrize("name", SCHEMAS)
def test_flags_and_texts(name: str) -> None:
    for key in keys(SCHEMAS[name]):
        label, kind, allowed, doc = key
        assert doc, f"{name} {label} has no documentation"
        text = {str, Path} & members(kind) and not allowed.choices
        for value in FLAGS if bool in members(kind) else TEXTS if text else ():
            fine = value is None and type(None) in members(kind) or value == "" and allowed.empty
            assert fine or refused(SCHEMAS[name], key, value), f"{name} {label}={value!r} was taken"


@pytest.mark.parametrize("name", SCHEMAS)
def test_lists_of_text(name: str) -> None:
    for key in keys(SCHEMAS[name]):
        if get_args(key[1]) == (str,):
            for value in (["a\x00"], [""], [[1]], "text", 5, {}, None, [None]):
                assert refused(SCHEMAS[name], key, value), f"{key[0]}={value!r}"


def of(schema: str, label: str) -> tuple[type, Key]:
    return SCHEMAS[schema], next(key for key in keys(SCHEMAS[schema]) if key[0] == label)


def test_sources_and_other_shapes() -> None:
    for value in ("text", 5, [], [5], [{}], [{"path": "a", "wieght": 1}], {"path": "a"}, None, [None]):
        assert refused(*of("train data", "data.train"), value), value
    for group in ("llm", "vision"):
        for value in (5, "llama", [1], {}, {"hidden_size": 3}, {"model_type": 5}):
            assert refused(*of(f"train {group}", f"{group}.architecture"), value), f"{group}={value!r}"
    for value in (0, 1.5, math.nan, "qx", "", [], ["q", "q"], [1], {}, None, True):
        assert refused(*of("train generator", "generator.types"), value), value


def test_options_of_sbatch() -> None:
    for label in ("sbatch", "evaluate_sbatch"):
        key = of("hydra.launcher", label)
        wrong = [{"--time": "5"}, {"time": [1]}, {"time": {}}, {"time": ""}, {"time": "a\nb"}, {"t": 5}, {"": 1}]
        wrong += [{"array": "0-3"}, {"dependency": "x"}, {"kill_on_invalid_dep": "no"}]
        for value in ("time", 5, [1], *wrong):
            assert refused(*key, value), f"{label}={value!r} was taken"
        for value in ({"time": "2:00:00", "gpus-per-node": 4, "exclusive": True, "cpus_per_task": 1}, {}):
            assert not refused(*key, value)


@pytest.mark.parametrize("name", COMMANDS)
def test_as_words_of_a_command(name: str) -> None:
    """Typed on a command line, where YAML has a say."""
    tree = needed(COMMANDS[name])
    for label, kind, allowed, _ in keys(COMMANDS[name]):
        if {int, float, bool} & members(kind) or allowed.choices:
            given = [f"{key}={value}" for key, value in tree.items() if isinstance(value, str) and key != label]
            for value in ("nan", ".inf", "1e20", "text", "[1, 2]", "{a: 1}", "'", "&a 1", "-1", "maybe"):
                if bool in members(kind) and value == "1e20":
                    continue
                with pytest.raises(ConfigError, match=label) as caught:
                    parse_options(COMMANDS[name], [*given, f"{label}={value}"])
                assert "\n" not in str(caught.value)
