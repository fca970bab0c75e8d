"""lmms-eval itself, unmodified: our server under it, and every benchmark's own task on a miniature.

Needs its environment (`make benchmarks-env`, or VLORA_BENCHMARKS), which is 7 GB and which CI has not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from tests.train import world
from tests.train.harness import hub, miniatures
from tests.train.harness.runs import make_run, plant
from train import config as configuration
from train.benchmark import split_job
from train.harness import catalogue, jobs
from train.harness.catalogue import Benchmark
from train.harness.environment import Environment, Process
from train.harness.jobs import Job, Results
from train.harness.server import Server

try:
    ENVIRONMENT = Environment.find()
except UserError as error:
    pytest.skip(f"lmms-eval is not installed: {error}", allow_module_level=True)

pytestmark = pytest.mark.slow


def test_every_task_scores_a_planted_model_as_worked_out_by_hand(tmp_path):
    benchmarks, asked = ask(tmp_path, catalogue.names(), "openai")
    scores = {}
    for name, one in benchmarks.items():
        metrics = jobs.metrics_of(tmp_path / "out", f"vlora_{name}")
        scores[name] = jobs.record_of(Job(name, one), metrics, 4, 1.0)["score"]
    assert scores == pytest.approx({name: score for name, (_, score) in miniatures.SAID.items()})
    own = [(f"q-{name}-{n}", [miniatures.colour(name, n)]) for name in benchmarks for n in range(4)]
    assert sorted(asked) == sorted(own)


def ask(folder: Path, names: list[str], client: str) -> tuple[dict[str, Benchmark], list]:
    """Run the miniatures of benchmarks; what the planted model was asked."""
    overrides = miniatures.write(folder / "data")
    benchmarks = {name: replace(catalogue.load(name), overrides=overrides[name]) for name in names}
    jobs.write_tasks(folder / "tasks", ENVIRONMENT, benchmarks)
    tasks = ",".join(f"vlora_{name}" for name in benchmarks)
    with miniatures.planted() as (address, asked):
        line = [str(ENVIRONMENT.python), "-m", "lmms_eval", "--model", client, "--model_args"]
        line += ["model_version=m,max_retries=1", "--tasks", tasks, "--include_path", str(folder / "tasks")]
        line += ["--output_path", str(folder / "out"), "--log_samples", "--batch_size", "1"]
        variables = ENVIRONMENT.variables(folder / "tasks", offline=True) | {"OPENAI_API_BASE": address}
        with Process(line, variables, folder / "log") as process:
            assert process.popen.wait(300) == 0, (folder / "log").read_text()[-3000:]
    return benchmarks, asked


@pytest.mark.parametrize("images", ["shuffled", "none"])
def test_controls_show_a_wrong_picture_or_none(tmp_path, images):
    _, asked = ask(tmp_path, ["gqa", "mmmu"], f"openai_{images}")
    shown = dict(asked)
    assert len(asked) == len(shown) == 8
    for name in ("gqa", "mmmu"):
        colours = [miniatures.colour(name, n) for n in range(4)]
        wrong = [[colours[(n + 2) % 4]] if images == "shuffled" else [] for n in range(4)]
        assert [shown[f"q-{name}-{n}"] for n in range(4)] == wrong


def test_a_server_that_is_gone_gives_no_score(tmp_path):
    run = make_run(world.make(tmp_path / "world"), tmp_path / "run")
    config = configuration.load(run / "config.yaml")
    job = split_job(config, "test", tmp_path / "tasks", "own", 2)
    jobs.write_tasks(tmp_path / "tasks", ENVIRONMENT, {})
    results = Results(tmp_path / "results", run / "export")
    with Process(["sleep", "600"], dict(os.environ), tmp_path / "log") as process:
        gone = Server(process, "http://127.0.0.1:9/v1", "none")
        with pytest.raises(UserError, match="2 of 2 requests failed, so there is no score"):
            jobs.run(job, ENVIRONMENT, tmp_path / "tasks", gone, results, set())
    assert results.find(job) is None


@pytest.mark.parametrize("connector", ["vlora", "mlp"])
def test_a_split_scores_as_train_evaluate_does(tmp_path, connector):
    parts = world.make(tmp_path / "world")
    run = make_run(parts, tmp_path / "run", connector)
    evaluate(run)
    plant(parts, predictions(run, "test-real"), "planted")
    evaluate(run, "split=planted")
    ours = json.loads((run / "evaluation/planted-real.json").read_text())["accuracy"]["overall"]["percent"]
    assert 30 < ours < 70
    done = command(f"run={run}", "split=planted", "images=own,none")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "evaluation/benchmarks.json").read_text())
    scores = {one["images"]: one["score"] for one in results["results"]}
    assert scores["own"] == ours
    assert scores["none"] < ours
    folder = run / "evaluation/benchmarks"
    lines = (folder / "split_planted-own.jsonl").read_text().split("\n")
    theirs = sorted(json.loads(line)["filtered_resps"].strip() for line in lines if line)
    assert theirs == sorted(one["prediction"].strip() for one in predictions(run, "planted-real"))
    # Killed before one was finished: that one alone is run again, now by lmms-eval's own ranks.
    kept = (folder / "split_planted-none.json").stat().st_mtime_ns
    (folder / "split_planted-own.json").unlink()
    done = command(f"run={run}", "split=planted", "images=own,none", "ranks=2")
    assert "1 of 2 tasks are finished" in done.stdout, done.stderr
    assert (folder / "split_planted-none.json").stat().st_mtime_ns == kept
    results = {one["images"]: one for one in json.loads((run / "evaluation/benchmarks.json").read_text())["results"]}
    assert results["own"]["score"] == ours and results["own"]["answered_by"] == "2 ranks"
    again = (folder / "split_planted-own.jsonl").read_text().split("\n")
    assert sorted(json.loads(line)["filtered_resps"].strip() for line in again if line) == theirs
    assert not running(tmp_path)


def test_given_answers_are_weighed_as_in_training(tmp_path):
    """In batches of unlike rows, with images and without, as one row after the other has its loss."""
    parts = world.make(tmp_path / "world")
    runs = [make_run(parts, tmp_path / name, name) for name in ("vlora", "mlp")]
    jobs.write_tasks(tmp_path / "tasks", ENVIRONMENT, {})
    script = textwrap.dedent("""
        import sys
        from types import SimpleNamespace
        import torch
        from PIL import Image
        from lmms_eval.models import get_model
        for run in sys.argv[1:]:
            model = get_model("vlora", force_simple=True).create_from_arg_string(f"run={run}", {"batch_size": 3})
            images = [[Image.new("RGB", (28, 28), colour)] for colour in ("red", "blue")] + [None, []]
            model.task_dict = {"t": {"s": list(range(4))}}
            asked = [("what color is the shape?", " red"), ("red?", "is there a blue shape?"), ("is there?", "no")]
            asked = [(*one, lambda n: images[n], n, "t", "s") for n, one in enumerate([*asked, asked[0]])]
            found = model.loglikelihood([SimpleNamespace(args=one) for one in [*asked, ("", "yes")]])
            shown = [images[one[3]] or [] for one in asked] + [[]]
            for (text, answer, *_), pictures, (total, greedy) in zip([*asked, ("", "yes")], shown, found, strict=True):
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}]
                row = model.processor.text.encode(turns, len(pictures))
                inputs = model.processor.batch([row.input_ids], [pictures], [row.image_at])
                out = model.model(**inputs, labels=torch.tensor([row.labels]))
                alone = -float(out.loss) * sum(label >= 0 for label in row.labels)
                assert abs(total - alone) < 1e-4 * abs(alone), (run, text, total, alone)
            print("weighed", len(found))
    """)
    (tmp_path / "weigh.py").write_text(script)
    line = [str(ENVIRONMENT.python), str(tmp_path / "weigh.py"), *map(str, runs)]
    variables = ENVIRONMENT.variables(tmp_path / "tasks", offline=True)
    done = subprocess.run(line, env=variables, text=True, capture_output=True)
    assert done.stdout.count("weighed 5") == 2, done.stderr[-3000:]


def test_data_are_fetched_on_a_login_node_and_missing_ones_named_before_a_job(tmp_path):
    """Against a hub on this machine: POPE is there, MME is not."""
    run = make_run(world.make(tmp_path / "world"), tmp_path / "run")
    miniatures.write(tmp_path / "data")
    there = {"data/test-00000-of-00001.parquet": tmp_path / "data/pope.parquet"}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "none", "VLORA_CACHE": str(tmp_path / "cache")}
    with hub.serving({"lmms-lab-encoder/POPE": there}) as address:
        fetched = command("tasks=pope,mme", "fetch=true", **home, HF_ENDPOINT=address)
    assert fetched.returncode == 2 and "pope: is there" in fetched.stdout, fetched.stderr
    assert "mme: DatasetNotFoundError: Dataset 'lmms-lab-encoder/MME' doesn't exist on the Hub" in fetched.stdout
    # The hub has gone: where jobs run there is none.
    refused = command(f"run={run}", "tasks=pope,mme", **home)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1] == (
        f"error: the data of mme are not in {home['HF_HOME']}; on a machine with internet that shares it: "
        "python -m train.benchmark tasks=mme fetch=true"
    )
    assert not (run / "evaluation/benchmarks/logs").exists()  # no server was started
    done = command(f"run={run}", "tasks=pope", **home)
    assert done.returncode == 0 and "pope-own:" in done.stdout and "(4 questions)" in done.stdout, done.stderr


def evaluate(run: Path, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "train.evaluate", f"run={run}", *words], cwd=world.ROOT, check=True)


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "train.benchmark", *words]
    return subprocess.run(line, cwd=world.ROOT, env=os.environ | variables, text=True, capture_output=True)


def predictions(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / f"evaluation/{name}.jsonl").read_text().splitlines()]


def running(folder: Path) -> list[str]:
    """Processes that carry the folder in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(process.name) != os.getpid():
            found.append(words)
    return found
