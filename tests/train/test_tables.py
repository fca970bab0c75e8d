"""The paper's tables: rows find their runs, full size and mini never meet, and what was not run says so."""

import json
import shutil
from pathlib import Path

import pytest

from common.files import DamagedFile
from train import config as configuration
from train import tables
from train.config import compose_overrides, resolve
from train.measure.paper_tables import TABLES, VLORA

FACTS = ("world_size", "zero_stage", "vision_features_cached")
RECORD = ("git_commit", "git_dirty", "versions")


def write(folder: Path, scores: dict, *overrides: str, steps: int = 10, val_loss: float | None = None) -> None:
    """A finetuning and, for a small one, the pretraining that it started from, as runs leave them."""
    config = resolve(compose_overrides(["stage=finetune", f"init_from={folder}-1", *overrides]))
    first = resolve(compose_overrides(["stage=pretrain", *(o for o in overrides if not o.startswith("optim"))]))
    for run, each, done in ((Path(f"{folder}-1"), first, 4), (folder, config, steps)):
        (run / "evaluation").mkdir(parents=True)
        configuration.save(each, run / "config.yaml")
        (run / "DONE").write_text("")
        (run / "facts.json").write_text(json.dumps({"machine": "a machine"} | dict.fromkeys(FACTS, 1)))
        (run / "run.json").write_text(json.dumps(dict.fromkeys(RECORD, "0123456789")))
        speed = {"samples_per_s": 2.0, "seconds": 1.0, "skipped_steps": 0, "loss": 1.0}
        lines = [{"step": step + 1} | speed for step in range(done)]
        lines += [{"step": done, "val_loss": val_loss}] if val_loss else []
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if "percent" in scores:
        overall = {"percent": scores["percent"], "low": 1.0, "high": 99.0, "count": 5}
        record = {"split": "test", "images": "real", "count": 5, "available": 9, "seconds": 1.0}
        record |= {"accuracy": {"overall": overall}, "blind_floor": {}}
        (folder / "evaluation/test-real.json").write_text(json.dumps(record))
    elif scores:
        (folder / "evaluation/benchmarks.json").write_text(json.dumps({"scores": scores, "results": []}))


def row(text: str, table: int, name: str) -> list[str]:
    part = text.split(f"## Table {table}:")[1].split("## ")[0]
    (line,) = (line for line in part.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def made(monkeypatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["tables", *words])
    assert tables.main() == 0
    return next(Path(word.partition("=")[2]) for word in words if word.startswith("out=")).read_text()


def test_rows_find_their_runs(tmp_path, capsys, monkeypatch):
    for seed, percent in enumerate((80.0, 82.0, 84.0)):
        write(tmp_path / f"a{seed}", {"percent": percent}, f"seed={seed}", "generator.types=qkvom")
    write(tmp_path / "b", {"percent": 70.0}, "generator.types=qkv")
    write(tmp_path / "c", {"percent": 10.0}, "generator.types=qkv", "generator.rank=64")  # two differences: no row of 3
    write(tmp_path / "d", {"percent": 75.0}, "connector=mlp")
    write(tmp_path / "e", {"MMBench": 62.5, "MME": 1300.0}, "experiment=vlora_7b")
    write(tmp_path / "f", {"MMBench": 64.0}, "experiment=llava_v15_7b_capsfusion")
    text = made(monkeypatch, f"runs={tmp_path}", f"out={tmp_path}/tables.md")
    assert capsys.readouterr().out.strip() == text.strip() and "2 runs at full size and 6 mini" in text
    ours = ["MMBench 62.5, MME 1300", "82.0 (77.0-87.0, 3 seeds)"]
    assert row(text, 3, "qkvom")[1:] == [*(f"{value:g}" for value in VLORA), *ours]
    assert row(text, 2, "VLoRA, CapsFusion")[-2:] == ours  # without the ablations
    assert row(text, 3, "qkv")[-2:] == ["not run", "70.0 (1.0-99.0, 1 seed)"]
    assert row(text, 3, "qk")[-2:] == ["not run", "not run"]
    assert row(text, 2, "LLaVA-v1.5, LLaVA-Pretrain")[-2:] == ["not run", "75.0 (1.0-99.0, 1 seed)"]
    assert row(text, 2, "LLaVA-v1.5, CapsFusion")[-2:] == ["MMBench 64", "-"]
    assert row(text, 6, "VLoRA")[5:] == ["28", "not run"] and row(text, 7, "LLaVA")[-1] == "not run"  # no mini column


def test_settings_lengths_and_rates_are_never_mixed(tmp_path, monkeypatch):
    tuned, other = "optim.lr.connector=0.003", "optim.lr.connector=0.01"
    for seed in (0, 1):
        write(tmp_path / f"mlp{seed}", {"percent": 60.0 + seed}, "connector=mlp", f"seed={seed}", tuned, val_loss=0.4)
        write(tmp_path / f"vlora{seed}", {"percent": 70.0 + seed}, f"seed={seed}")
    write(tmp_path / "rate", {}, "connector=mlp", other, val_loss=0.5)  # tried on validation data, never scored
    write(tmp_path / "time", {"percent": 90.0}, "connector=mlp", tuned, steps=40)  # equal time, not equal samples
    write(tmp_path / "again", {"percent": 70.0}, "seed=0")  # a repetition is no third seed
    write(tmp_path / "llm", {"percent": 20.0}, "llm=tiny", "generator=smollm2_135m")
    text = made(monkeypatch, f"runs={tmp_path}", f"out={tmp_path}/tables.md", f"trials={tmp_path}/trials.jsonl")
    head = next(line for line in text.splitlines() if line.startswith("| how the image"))
    assert head.index("smollm2-135m-instruct, easy_vqa/test") < head.index("tiny-llama, easy_vqa/test")
    mlp = row(text, 2, "LLaVA-v1.5, LLaVA-Pretrain")
    assert mlp[-1] == "not run" and mlp[-2].startswith("60.5 (") and mlp[-2].endswith("2 seeds)")
    assert row(text, 2, "VLoRA, CapsFusion")[-2:] == ["70.5 (64.1-76.9, 2 seeds)", "20.0 (1.0-99.0, 1 seed)"]
    costs = text.split("## The connectors at equal samples and at equal time")[1].split("## ")[0]
    ((longer),) = (line for line in costs.splitlines() if "1920" in line)
    # 4 steps of 48 and 40 of 48 at 2 images a second.
    assert "| mlp | 192, 1920 | 2 | connector 0.003" in longer and "| 17.6 | 90.0 (" in longer
    assert costs.count("| mlp |") == 2 and costs.count("| vlora |") == 2
    rates = text.split("## Rates that were tried")[1]
    assert "connector 0.01, " in rates and "0.5000" in rates and "connector 0.003, " in rates and "vlora" not in rates


def test_connectors_are_compared_at_their_best_rates_and_ablations_at_the_usual_ones(tmp_path, monkeypatch):
    best = "optim.lr.connector=0.0001"
    for seed in (0, 1):
        write(tmp_path / f"qkvo{seed}", {"percent": 70.0}, f"seed={seed}", val_loss=0.3)
        write(tmp_path / f"qkv{seed}", {"percent": 50.0}, f"seed={seed}", "generator.types=qkv", val_loss=0.1)
    write(tmp_path / "tuned", {"percent": 80.0}, best, val_loss=0.2)
    write(tmp_path / "rank", {"percent": 71.0}, "generator.rank=32", val_loss=0.3)
    write(tmp_path / "tuned-rank", {"percent": 81.0}, "generator.rank=32", best, val_loss=0.2)
    write(tmp_path / "rank64", {"percent": 72.0}, "generator.rank=64", val_loss=0.3)
    text = made(monkeypatch, f"runs={tmp_path}", f"out={tmp_path}/tables.md")
    assert row(text, 2, "VLoRA, CapsFusion")[-1] == "80.0 (1.0-99.0, 1 seed)"
    assert row(text, 3, "qkv")[-1] == "50.0 (50.0-50.0, 2 seeds)"
    assert row(text, 4, "16")[-1] == "70.0 (70.0-70.0, 2 seeds)" and row(text, 4, "32")[-1] == "71.0 (1.0-99.0, 1 seed)"
    assert "px; connector 0.0008, " in text.split("## Table 4")[1].split("\n| 16")[0]


def test_trials_outlive_their_runs(tmp_path, monkeypatch):
    runs, kept = tmp_path / "runs", tmp_path / "trials.jsonl"
    write(runs / "a", {"percent": 80.0})
    words = [f"runs={runs}", f"out={tmp_path}/tables.md", f"trials={kept}"]
    first = made(monkeypatch, *words)
    shutil.rmtree(runs)
    write(runs / "b", {"percent": 70.0}, "connector=qformer")
    write(runs / "c", {}, val_loss=0.3)  # as `a`, not scored this time: the score stays
    text = made(monkeypatch, *words)
    assert row(text, 2, "VLoRA, CapsFusion") == row(first, 2, "VLoRA, CapsFusion")
    assert row(text, 2, "LLaVA with a Q-Former, CapsFusion")[-1] == "70.0 (1.0-99.0, 1 seed)"
    assert len(kept.read_text().splitlines()) == 2
    kept.write_text(kept.read_text().replace('"rank"', '"rang"', 1))
    monkeypatch.setattr("sys.argv", ["tables", *words])
    with pytest.raises(DamagedFile, match="line 1, is damaged: it has no 'rank'"):
        tables.main()


def test_what_is_printed_is_consistent():
    for table in TABLES:
        for row_ in table.rows:
            assert not row_.scores or len(row_.scores) == len(table.benchmarks), (table.number, row_.name)
    for number in (3, 4, 5):
        (table,) = (table for table in TABLES if table.number == number)
        assert [each.scores for each in table.rows].count(VLORA) == 1
    (fine,) = (table for table in TABLES if table.number == 6)
    for each in fine.rows:
        assert each.scores[-1] == pytest.approx(
            sum(each.scores[:4]) / 4, abs=0.06
        )  # the paper's own averages are wrong
