"""The paper's tables: rows find their runs, full size and mini never meet, and what was not run says so."""

import json
from pathlib import Path

import pytest

from train import config as configuration
from train import tables
from train.config import compose_overrides, resolve
from train.measure.paper_tables import TABLES, VLORA


def write(folder: Path, scores: dict, *overrides: str) -> None:
    folder.mkdir(parents=True)
    config = resolve(compose_overrides(["stage=finetune", "init_from=x", *overrides]))
    configuration.save(config, folder / "config.yaml")
    (folder / "evaluation").mkdir()
    if "percent" in scores:
        record = {"accuracy": {"overall": {"percent": scores["percent"], "low": 1.0, "high": 99.0, "count": 5}}}
        (folder / "evaluation/test-real.json").write_text(json.dumps(record))
    else:
        (folder / "evaluation/benchmarks.json").write_text(json.dumps({"scores": scores, "results": []}))


def row(text: str, table: int, name: str) -> list[str]:
    part = text.split(f"## Table {table}:")[1].split("## ")[0]
    (line,) = (line for line in part.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_find_their_runs(tmp_path, capsys, monkeypatch):
    for seed, percent in enumerate((80.0, 82.0, 84.0)):
        write(tmp_path / f"a{seed}", {"percent": percent}, f"seed={seed}", "generator.types=qkvom")
    write(tmp_path / "b", {"percent": 70.0}, "generator.types=qkv")
    write(tmp_path / "c", {"percent": 10.0}, "generator.types=qkv", "generator.rank=64")  # two differences: no row of 3
    write(tmp_path / "d", {"percent": 75.0}, "connector=mlp")
    write(tmp_path / "e", {"MMBench": 62.5, "MME": 1300.0}, "experiment=vlora_7b")
    monkeypatch.setattr("sys.argv", ["tables", f"runs={tmp_path}", f"out={tmp_path}/tables.md"])
    assert tables.main() == 0
    text = (tmp_path / "tables.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip() and "1 runs at full size and 6 mini" in text
    ours = ["MMBench 62.5, MME 1300", "82.0 (77.0-87.0, 3 seeds)"]
    assert row(text, 3, "qkvom")[1:] == [*(f"{value:g}" for value in VLORA), *ours]
    assert row(text, 2, "VLoRA, CapsFusion")[-2:] == ours  # without the ablations
    assert row(text, 3, "qkv")[-2:] == ["not run", "70.0 (1.0-99.0, 1 seed)"]
    assert row(text, 3, "qk")[-2:] == ["not run", "not run"]
    assert row(text, 2, "LLaVA-v1.5, LLaVA-Pretrain")[-2:] == ["not run", "75.0 (1.0-99.0, 1 seed)"]
    assert row(text, 6, "VLoRA")[5] == "28"


def test_what_is_printed_is_consistent():
    for table in TABLES:
        for name, scores, _ in table.rows:
            assert not scores or len(scores) == len(table.benchmarks), (table.number, name)
    for number in (3, 4, 5):
        (table,) = (table for table in TABLES if table.number == number)
        assert [scores for _, scores, _ in table.rows].count(VLORA) == 1
    (fine,) = (table for table in TABLES if table.number == 6)
    for _, scores, _ in fine.rows:
        assert scores[-1] == pytest.approx(sum(scores[:4]) / 4, abs=0.06)  # the paper's own averages are wrong
