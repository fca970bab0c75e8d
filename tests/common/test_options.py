"""The values typed are the values used, in commands of our own and through Hydra's grammar."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from common.errors import ConfigError
from common.options import as_typed, load_yaml, parse_options
from common.settings import documentation, setting


@dataclass
class Item:
    """One.

    Attributes:
        path: Where.
        weight: How much.
    """

    path: str = "???"
    weight: float = 1.0


@dataclass
class Options:
    """Some keys.

    Attributes:
        name: A name.
        where: A folder.
        count, size: Numbers
            of things.
        flag: Whether.
        tags: Words.
        items: Things.
    """

    name: str = "???"
    where: str | None = setting(None, path=True)
    count: int = setting(1, within="[1, 10]")
    size: float | None = None
    flag: bool = False
    tags: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


TYPED = ["20240101_120000", "0777", "1e3", "true", "null", "1.0", "a=b", "dé", "x(1)", "a,b", "#1", "it's", "~x", "a b",
         "\\", "a\\", "C:\\dir", "\\'", "'", "[a]", "{a}", "yes", "", "$x", "-1", "nan", "日本", '"']  # fmt: skip


@pytest.mark.parametrize("text", [t for t in TYPED if t])
def test_a_text_is_taken_as_it_was_typed(text: str) -> None:
    assert parse_options(Options, [f"name={text}"]).name == text


def through_hydra(*words: str, multirun: bool = False) -> dict:
    parser = OverridesParser.create()
    overrides = parser.parse_overrides(as_typed(list(words), Options, multirun))
    return {override.key_or_group: override.value() for override in overrides}


@pytest.mark.parametrize("text", [t for t in TYPED if t])
def test_hydra_takes_a_text_as_it_was_typed(text: str) -> None:
    assert str(through_hydra(f"name={text}")["name"]) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_hydra_takes_any_text(text: str) -> None:
    if not (len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]):  # quoted by the user
        assert str(through_hydra(f"name={text}")["name"]) == text


def test_what_hydra_has_to_read_is_left_alone() -> None:
    words = ["where=null", "count=3", "flag=true", "~where", "name='a b'", "+name=x", "other=1e3", "llm=tiny"]
    assert as_typed(words, Options) == words


def test_lists_of_text_and_of_things() -> None:
    assert through_hydra("tags=[0777,1e3]")["tags"] == ["0777", "1e3"]
    assert through_hydra("items=a/b")["items"] == [{"path": "a/b"}]
    assert through_hydra("items=[a/b,20240101_1]")["items"] == [{"path": "a/b"}, {"path": "20240101_1"}]
    assert through_hydra("items=[{path: a, weight: 2}]")["items"] == [{"path": "a", "weight": 2}]
    assert through_hydra("items=[]")["items"] == []


def test_a_sweep_over_texts_stays_one() -> None:
    assert as_typed(["name=a,0777"], Options, multirun=True) == ["name=a,'0777'"]
    assert as_typed(["name=choice(a,b)"], Options, multirun=True) == ["name=choice(a,b)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nmae=x"], r"unknown configuration key `nmae`; did you mean `name`\?"),
        (["name"], r"name: write key=value; keys: name, where"),
        (["name=x", "name=y"], "name is given twice"),
        ([], r"`name` has no value; set it on the command line: name=\.\.\."),
        (["name=x", "count=many"], r"count"),
        (["name=x", "count=11"], r"count=11: must be at least 1 and at most 10"),
        (["name=x", "count=1.5"], r"count"),
        (["name=x", "size=nan"], r"size=nan: must be a finite number"),
        (["name=x", "size=.inf"], r"size=inf: must be a finite number"),
        (["name="], r"name='': must not be empty"),
        (["name=x", "flag=perhaps"], r"flag"),
        (["name=a\x00b"], r"control character"),
        (["name=x", "count=&a [*a]"], r"anchors and aliases"),
        (["name=x", "count=[1"], r"count=\[1: no readable YAML"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_options(Options, words)
    assert "\n" not in str(caught.value)


def test_the_home_folder_is_expanded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_options(Options, ["name=~/x", "where=~/x"]) == Options("~/x", "/home/me/x")


def test_help_lists_every_key_and_ends_well(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(Options, ["--help"], "What it does.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and shown.startswith("What it does.")
    assert "count (1; at least 1 and at most 10)" in shown and "Numbers of things." in shown and "name (needed" in shown


def test_documentation_of_attributes() -> None:
    assert documentation(Options)["size"] == documentation(Options)["count"] == "Numbers of things."


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a: &a [x, x]"] + [
        f"{new}: &{new} [*{old}, *{old}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(ConfigError, match="anchors and aliases"):
        load_yaml("\n".join(lines))
    assert load_yaml("") == OmegaConf.create({})
