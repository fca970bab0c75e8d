"""Every command with values that are well written and wrong: one line that names the key, and nothing is written."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path

import pytest

from common import settings
from common.errors import report_errors
from common.places import cache
from serve import chat
from tests.train import world
from tests.train.config.test_wrong_values import COMMANDS, members
from tests.train.harness.runs import make_run
from tests.train.world import ROOT
from tests.vlora.conftest import parts  # noqa: F401  (a fixture)
from train import evaluate
from train.data import EvalLoader
from train.measure.results import Evaluation

RUN, IMAGE = "run={run}", "image={image}"
ASKED = [RUN, IMAGE, "question=what color?"]
# Of each command: what makes it whole, then wrong values.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "serve.ask": (
        ASKED,
        ["run=nowhere", "run={image}", "device=tpu", "device=cuda:99", "llm.path=nowhere", "llm.path={parts}/vision",
         "vision.path=nowhere", "vision.path={parts}/llm", "image=nowhere", "image={run}", "image={text}",
         "questions=nowhere", "questions={run}", "questions={image}", "weights=nowhere", "weights={text}",
         "save=nowhere/there.safetensors", "save={run}"],
    ),
    "serve.chat": (
        [RUN, IMAGE],
        ["run=nowhere", "device=tpu", "llm.path=nowhere", "vision.path=nowhere", "image=nowhere", "image={text}"],
    ),
    "serve.__main__": (
        [RUN, "port=0"],
        ["run=nowhere", "device=tpu", "llm.path=nowhere", "vision.path=nowhere", "host=no.such.host.invalid",
         "allow=/etc", "allow=ftp://host/", "allow=https://", "api_key=schlüssel"],
    ),
    "train.plan": (
        [],
        ["nodes=0", "nodes=two", "nodes=1,,2", "nodes=1e20", "nodes=99999999999999", "beside=generator.rnak=4",
         "beside=nothing", "beside=connector=mpl"],
    ),
    "train.flops": ([], ["out={image}", "out={image}/below"]),
    "train.official": (
        ["run={run}", "out=made"],
        ["checkpoint=nowhere", "checkpoint={parts}", "run=nowhere", "run={parts}", "out={run}"],
    ),
    "train.benchmark": (
        [RUN, "tasks=pope"],
        ["run=nowhere", "run={parts}", "tasks=mbench", "tasks=,", "images=own,wrong", "images=,",
         "environment=nowhere", "environment={run}"],
    ),
    "train.adapter": (
        [RUN, IMAGE, "out=made"],
        ["run=nowhere", "llm.path=nowhere", "vision.path=nowhere", "image=nowhere", "image={run}", "image={text}",
         "images=nowhere", "images={image}", "types=qx", "types=qq", "types=", "out={image}", "questions=nowhere",
         "questions={run}", "questions={image}"],
    ),
    "train.evaluate": (
        [RUN],
        ["run=nowhere", "run={parts}", "split=nowhere", "split=../..", "split={image}", "llm.path=nowhere",
         "vision.path=nowhere", "llm.path={parts}/vision"],
    ),
    "train.report": (
        [RUN],
        ["run=nowhere", "run={parts}", "run={run},nowhere", "run={run},{run}", "run=,", "out={image}",
         "out={image}/below"],
    ),
    "train.tables": (
        ["runs={home}"],
        ["runs=nowhere", "runs={image}", "trials={run}", "trials={image}", "trials=nowhere/trials.jsonl", "out={run}",
         "out=nowhere/there.md"],
    ),
    "benchmarks.inference": (
        ["llm={parts}/llm", "vision={parts}/vision"],
        ["llm=nowhere", "vision=nowhere", "ranks=four", "ranks=0", "ranks=", "types=qx", "text=0", "text=,",
         "questions=x", "batch=1.5", "out={run}"],
    ),
}  # fmt: skip
PARSED: dict[str, tuple[list[str], list[list[str]]]] = {
    "train.chain": (
        ["made"],
        [["--nodes", "0"], ["--nodes", "two"], ["--tasks-per-node", "-1"], ["--sbatch", "time"],
         ["--evaluate-sbatch", "=5"], ["--prepare-sbatch", "time="], ["--statsu"], ["--status"]],
    ),
    "train.demo": (
        ["--out", "made"],
        [["--data", "cats"], ["--llm", "big"], ["--connectors", "clip"], ["--questions", "-5"], ["--questions", "all"],
         ["sed=1"], ["seed=one"], ["seed"], ["--seed", "1"]],
    ),
    "train.sweep_report": ([], [["nowhere"], ["{run}"], ["{image}"], ["{run}", "--max-samples", "0"], []]),
    "data_prep.verify": ([], [["nowhere"], ["{run}"], ["{image}"], []]),
    "data_prep.report": ([], [["nowhere"], ["{run}"], ["{image}"], []]),
    "data_prep.sources.capsfusion": (
        ["{run}", "made"], [["--fraction", "0"], ["--fraction", "half"], ["--fraction", "nan"], []],
    ),
    "data_prep.parts.tiny_llm": (
        [], [["--steps", "0"], ["--steps", "1e9"], ["--cache", "{run}"], ["--data", "nothing"]],
    ),  # fmt: skip
    "data_prep.parts.cutouts": ([], [["emojis"], ["--cash", "x"]]),
    "data_prep.parts.builtin": ([], [["smolm2"], ["--cash", "x"]]),
    "model.ops.tuner": ([], [["1", "2", "3"], ["0", "1", "1", "1"], ["a"], []]),
}  # fmt: skip
"""Commands of words and --options: what makes each whole, and wrong words."""
FREE = {"serve.ask question", "serve.__main__ name", "train.tables split", "train.official cache_dir"}
"""Texts that mean what they say, whatever they say."""
TESTED_ELSEWHERE = {"train.official llm", "train.official vision", "train.benchmark split", "train.benchmark llm.path",
                    "train.benchmark vision.path"}  # fmt: skip
"""They need a checkpoint or an environment: test_official.py, test_benchmark.py."""


@pytest.fixture(scope="module")
def places(parts, tmp_path_factory):  # noqa: F811
    home = tmp_path_factory.mktemp("home")
    (home / "red.png").write_bytes(world.picture(world.COLORS["red"]))
    (home / "text.png").write_text("no picture")
    run = make_run(parts, home / "run")
    return {"home": home, "run": run, "image": home / "red.png", "text": home / "text.png", "parts": parts}


def test_every_text_of_every_command_is_tried():
    assert CASES.keys() == COMMANDS.keys()
    for name, schema in COMMANDS.items():
        tried = {word.partition("=")[0] for word in CASES[name][1]}
        for key, kind, allowed, _ in settings.keys(schema):
            if str in members(kind) and not allowed.choices and f"{name} {key}" not in FREE | TESTED_ELSEWHERE:
                assert key in tried, f"{name} {key}"


def test_every_parser_is_tried():
    files = [file for room in ("train", "serve", "data_prep", "model") for file in (ROOT / room).rglob("*.py")]
    texts = {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in files}
    assert {name for name, text in texts.items() if "from common.arguments import Parser" in text} == PARSED.keys()
    plain = {name for name, text in texts.items() if "argparse.ArgumentParser(" in text}
    # One that no user calls, and one without words.
    assert plain <= {"train.engine.weights_only", "model.ops.cuda.build"}


@pytest.mark.parametrize(("command", "wrong"), [(name, word) for name, (_, cases) in PARSED.items() for word in cases])
def test_wrong_words_are_one_line_and_nothing_is_written(command, wrong, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.format(**places) for word in (*PARSED[command][0], *wrong)]
    before = sorted(places["home"].rglob("*"))
    monkeypatch.setattr("sys.argv", [command, *words])
    code = report_errors(importlib.import_module(command).main)
    out, err = capsys.readouterr()
    assert code == 2 and not out and re.fullmatch(r"error: [^\n]{10,400}\n", err), err
    keys = [word.partition("=")[0] for word in words]
    assert any(word in err for word in [*words, *filter(None, keys), "required"]), err
    assert list(Path().rglob("*")) == [] and sorted(places["home"].rglob("*")) == before


@pytest.mark.parametrize(("command", "wrong"), [(name, word) for name, (_, words) in CASES.items() for word in words])
def test_a_wrong_value_is_one_line_and_nothing_is_written(command, wrong, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLORA_CACHE", str(cache()))
    key = wrong.partition("=")[0]
    whole = [word for word in CASES[command][0] if word.partition("=")[0] != key]
    words = [word.format(**places) for word in (*whole, wrong)]
    before = sorted(file for file in places["home"].rglob("*"))
    monkeypatch.setattr("sys.argv", [command, *words])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("it serves"))  # for ever
    code = report_errors(importlib.import_module(command).main)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(said) == 1, said
    assert len(said[0]) < 600
    named = [key.partition(".")[0], *re.split("[,=]", words[-1].partition("=")[2])]
    assert any(word and word in said[0] for word in named), said[0]
    assert list(Path().rglob("*")) == [] and sorted(places["home"].rglob("*")) == before


def test_a_piped_chat_shows_its_questions(places, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serve.chat", f"run={places['run']}", f"image={places['image']}"])
    monkeypatch.setattr("sys.stdin", io.StringIO("what color?\n\n/images\n"))
    assert chat.main() == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(">")]
    assert said == ["> what color?", "> /images"]


def test_an_evaluation_reads_its_images_once(places, monkeypatch, capsys):
    read, original = [], EvalLoader.__iter__
    monkeypatch.setattr(EvalLoader, "__iter__", lambda loader: read.append(loader) or original(loader))
    monkeypatch.setattr("sys.argv", ["train.evaluate", f"run={places['run']}"])
    assert evaluate.main() == 0 and len(read) == 1
    (file,) = (places["run"] / "evaluation").glob("*.json")
    assert Evaluation.read(file).weights is not None
