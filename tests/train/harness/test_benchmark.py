"""Benchmarks without lmms-eval: the catalogue, what is kept, the tables, an exported split, and processes that end."""

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import wandb
from PIL import Image

from common.errors import ConfigError, UserError
from data_prep.store.sample import Sample
from data_prep.store.writer import write_split
from tests.slurm import offline_wandb
from tests.train import world
from tests.train.harness.runs import make_run
from train import benchmark
from train import config as configuration
from train.harness import catalogue, jobs, local, table
from train.harness.environment import Environment, Process
from train.harness.jobs import Job, Results
from train.measure.paper_tables import FINE, GENERAL
from train.measure.scoring import Question, score
from train.process.run_files import RunDir


def test_suites():
    paper, images = catalogue.suite("paper")
    assert {one.title for one in paper.values()} == {*GENERAL, *FINE[:-1]} and images == ("own",)
    seeing, images = catalogue.suite("seeing")
    assert {one.title for one in seeing.values()} == set(table.SEEING) and images == ("own", "shuffled", "none")
    every, _ = catalogue.suite("all")
    assert set(every) == set(paper) | set(seeing) == set(catalogue.names())
    with pytest.raises(ConfigError, match="mbench: no such benchmark; there are ccbench"):
        catalogue.load("mbench")


def test_wrong_command_lines():
    def chosen(**keys):
        return benchmark.chosen(benchmark.Options(**keys))

    with pytest.raises(ConfigError, match="name what to run"):
        chosen()
    with pytest.raises(ConfigError, match="images=wrong: choose of own, shuffled, none"):
        chosen(suite="paper", images="own,wrong")
    found, images = chosen(suite="paper", tasks="pope, mme", images="none")
    assert (list(found), images) == (["pope", "mme"], ("none",))


def test_an_environment_that_is_not_there_or_of_another_version(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no environment for the benchmarks there; make benchmarks-env"):
        Environment.find(str(tmp_path))
    packages = tmp_path / "lib/python3.11/site-packages"
    (packages / "lmms_eval-0.6.0.dist-info").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    monkeypatch.setenv("VLORA_BENCHMARKS", str(tmp_path))
    with pytest.raises(UserError, match=r"has lmms-eval 0\.6\.0, not 0\.7\.3"):
        Environment.find()
    (packages / "lmms_eval-0.6.0.dist-info").rename(packages / "lmms_eval-0.7.3.dist-info")
    found = Environment.find()
    assert found.tasks == packages / "lmms_eval/tasks"
    monkeypatch.setenv("OPENAI_API_KEY", "mine, and it costs money")
    monkeypatch.setenv("WORLD_SIZE", "8")
    told = found.variables(tmp_path, offline=True)
    assert told["OPENAI_API_KEY"] == "none" and "WORLD_SIZE" not in told and told["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="has no task file pope/pope.yaml"):
        jobs.task_file("pope", catalogue.load("pope"), found.tasks)


def test_a_result_is_that_of_one_export_and_its_settings(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export/checksums.json").write_text('{"model.safetensors": 1}')
    results = Results(tmp_path / "results", tmp_path / "export")
    job = Job("mme", catalogue.load("mme"))
    assert results.find(job) is None
    (tmp_path / "results").mkdir()
    record = jobs.record_of(job, {"mme_perception_score": 1300.0, "mme_cognition_score": 200.0}, 10, 1.0)
    results.keep(job, record, None)
    assert results.find(job)["score"] == 1300.0
    assert results.find(replace(job, limit=5)) is None and results.find(replace(job, images="none")) is None
    assert results.find(replace(job, benchmark=replace(job.benchmark, max_tokens=7))) is None
    (tmp_path / "export/checksums.json").write_text('{"model.safetensors": 2}')
    assert Results(tmp_path / "results", tmp_path / "export").find(job) is None
    results.file(job).write_text('{"score": 13')
    assert results.find(job) is None
    with pytest.raises(UserError, match="gives no mme_perception_score; it gives other"):
        jobs.record_of(job, {"other": 1.0}, 10, 1.0)


def test_tables_hold_what_was_measured_and_nothing_else():
    def record(name, images, value, limit=None):
        job = Job(name, catalogue.load(name), images, limit)
        metrics = dict.fromkeys(job.benchmark.metric, value / job.benchmark.scale)
        return jobs.record_of(job, metrics, 20, 1.0)

    records = [record("pope", "own", 80.0), record("pope", "none", 50.5), record("mme", "own", 900.0, limit=20)]
    text = table.render(records, "outputs/x")
    (ours,) = (line for line in text.split("## Seeing")[1].splitlines() if "this run" in line)
    assert ours == "| **this run** | 80.0 | - | - |"
    assert "| **this run** | - | - | - | - | - | - |" in text.split("## Table 1")[1]  # a part of MME is none
    assert "| POPE | 80.0 | - | 50.5 | 29.5 |" in text
    assert "first 20: no benchmark score" in text
    for scores in table.ANCHORS.values():
        assert set(scores) <= {*GENERAL, *FINE, *table.SEEING}


def test_an_exported_split_has_the_pixels_and_the_scoring_of_an_evaluation(tmp_path):
    parts = world.make(tmp_path / "world")
    run = make_run(parts, tmp_path / "run")
    config = configuration.load(RunDir(run).config)
    clear = Image.new("RGBA", (20, 20), (0, 0, 255, 0))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    files = [encoded(clear, "PNG"), encoded(photo, "JPEG")]
    reference = {"kind": "k", "answers": ["two", "2"], "match": "number"}
    talks = [world.dialogue("how many?", "two"), [*world.dialogue("a", "b"), *world.dialogue("and now?", "c")]]
    plain = {"kind": "", "answers": [], "match": "exact"}
    samples = [Sample("s", files, talks, "x", [reference, plain]), Sample("t", [], talks[:1], "x", [reference])]
    write_split(parts / "data/mixed", samples)
    name = local.export(config, "mixed", tmp_path / "task")
    rows = pq.read_table(tmp_path / "task" / f"{name}.parquet").to_pylist()
    assert [(row["sample"], row["dialogue"], len(row["images"])) for row in rows] == [
        ("s", 0, 2),
        ("s", 1, 2),
        ("t", 0, 0),
    ]
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in rows[0]["images"]]
    assert (shown[0] == 255).all()  # transparent pixels are white
    assert (shown[1] == np.asarray(Image.open(io.BytesIO(files[1])).convert("RGB"))).all()
    shutil.move(tmp_path / "task", tmp_path / "moved")  # it needs nothing of ours
    task = loaded(tmp_path / "moved/split_task.py")
    messages = task.doc_to_messages(rows[1])
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"] and task.doc_to_text(rows[1]) == "and now?"
    for said in ("2", "Two.", "three"):
        wanted = score(Question.of("s", "how many?", "two", reference), said)
        assert task.process_results(rows[0], [said]) == {"right": 100 * wanted}
    assert "split_task.doc_to_messages" in (tmp_path / f"moved/{name}.yaml").read_text()


def test_a_failed_request_is_no_wrong_answer():
    lines = [{"filtered_resps": "a\u2028b"}, {"filtered_resps": "[LMMS_EVAL_REQUEST_FAILED after 3 retries] Error"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    assert jobs.count_answers(text) == (2, 1)


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def loaded(file: Path):
    spec = importlib.util.spec_from_file_location("exported_task", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_a_process_ends_with_its_children(tmp_path):
    log = tmp_path / "log"
    with Process(["bash", "-c", "sleep 600 & echo $!; wait"], dict(os.environ), log) as process:
        while not log.read_text().strip():
            time.sleep(0.02)
        child = int(log.read_text())
        assert alive(child) and process.tail() == str(child)
    assert gone(process.popen.pid) and gone(child)


def test_a_process_ends_when_its_owner_is_killed(tmp_path):
    owner = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from train.harness.environment import Process
        process = Process(["sleep", "600"], dict(os.environ), Path(sys.argv[1]))
        print(process.popen.pid, flush=True)
        time.sleep(600)
    """)
    command = [sys.executable, "-c", owner, str(tmp_path / "log")]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=world.ROOT)
    pid = int(started.stdout.readline())
    assert alive(pid)
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.close()
    assert gone(pid)


def test_scores_for_the_paper_s_tables_and_the_runs_wandb_page_are_of_whole_benchmarks(tmp_path, capsys):
    parts = world.make(tmp_path / "world")
    run = make_run(parts, tmp_path / "run")
    config = configuration.load(RunDir(run).config)
    results = Results(RunDir(run).evaluation / "benchmarks", RunDir(run).export)
    results.folder.mkdir(parents=True)
    whole, part = Job("gqa", catalogue.load("gqa")), Job("pope", catalogue.load("pope"), limit=4)
    for job in (whole, part, Job("gqa", catalogue.load("gqa"), "none")):
        results.keep(job, jobs.record_of(job, dict.fromkeys(job.benchmark.metric, 0.5), 4, 1.0), None)
    config.tracking.wandb = "offline"
    benchmark.report(run, results, [part], config)
    found = json.loads((RunDir(run).evaluation / "benchmarks.json").read_text())
    assert found["scores"] == {"GQA": 50.0} and len(found["results"]) == 3
    assert (RunDir(run).evaluation / "benchmarks.md").read_text() in capsys.readouterr().out
    wandb.teardown()  # its service writes the last records just behind `finish`
    (page,) = offline_wandb.read(run)
    (row,) = [row for row in page.rows if "benchmarks.nrows" in row]
    assert page.id == "harness"
    assert {key: value for key, value in row.items() if key.startswith("benchmark/")} == {
        "benchmark/gqa/own": 50.0,
        "benchmark/gqa/none": 50.0,
    }
    assert row["benchmarks.nrows"] == 3
