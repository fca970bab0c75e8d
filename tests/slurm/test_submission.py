"""What can be known without training: headers, quoting, decisions of the batch shell, sweeps, the chain."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.store.split import Split
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize(
    "script", [*SCRIPTS, ROOT / "slurm/body.sh", ROOT / "slurm/site.example.sh"], ids=lambda p: p.name
)
def test_shell_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        command = ["shellcheck", "--external-sources", "--shell=bash", "--exclude=SC1091", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_headers_fit_production_nodes(cluster: Cluster, script: Path) -> None:
    cluster.run("sbatch", "--test-only", str(script), cwd=ROOT)


def test_bad_profiles_are_refused(cluster: Cluster) -> None:
    script = str(ROOT / "slurm/pretrain.sbatch")
    cluster.run("sbatch", "--test-only", "--nodes=2", script, cwd=ROOT)
    for wrong in (
        {"SBATCH_PARTITION": "nowhere"},
        {"SBATCH_CONSTRAINT": "h100"},
        {"SBATCH_GPUS_PER_NODE": "9"},
        {"SBATCH_TIMELIMIT": "soon"},
    ):
        with pytest.raises(RuntimeError):
            cluster.run("sbatch", "--test-only", script, cwd=ROOT, **wrong)


def test_example_profile_is_accepted(cluster: Cluster, tmp_path: Path) -> None:
    """With its commented options filled in for this cluster."""
    text = (ROOT / "slurm/site.example.sh").read_text()
    text = text.replace("#export SBATCH_PARTITION=gpu", "export SBATCH_PARTITION=gpu,urgent")
    text = text.replace("#export SBATCH_CONSTRAINT=a100", "export SBATCH_CONSTRAINT=a100")
    (tmp_path / "site.sh").write_text(text)
    command = 'source "$1"; sbatch --test-only slurm/pretrain.sbatch'
    cluster.run("bash", "-c", command, "_", str(tmp_path / "site.sh"), cwd=ROOT)


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """Stands where Python would: writes down its arguments and plays a front end, a preflight or a worker.

    What a worker does comes from the file `script` beside it, one line per lifetime.
    """
    program = tmp_path / "python"
    program.write_text(
        f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
here = Path({str(tmp_path)!r})
module, *arguments = sys.argv[2:]
if os.environ.get("SLURM_PROCID", "0") == "0":
    with (here / "calls").open("a") as stream:
        stream.write(repr([module, os.environ["MASTER_ADDR"], *arguments]) + "\\n")
if module == "train":
    run = here / "run"
    run.mkdir(exist_ok=True)
    print(f"run directory: {{run}}")
elif module == "train.worker":
    time.sleep(0.3)
    run = Path(arguments[0])
    plan = (here / "plan").read_text().splitlines()
    action = plan[min(int(os.environ.get("SLURM_RESTART_COUNT", "0")), len(plan) - 1)].split()
    if os.environ["SLURM_PROCID"] == "0":
        for word in action[1:]:
            name, _, text = word.partition("=")
            if name == "sleep":
                time.sleep(float(text))
                continue
            (run / name).write_text((text or "x").replace("_", " ") + "\\n")
    sys.exit(int(action[0]))
"""
    )
    program.chmod(0o755)
    (tmp_path / "site.sh").write_text(
        f"export VLORA_PYTHON={program} VLORA_LOGS={tmp_path} VLORA_CACHE= VLORA_SCRATCH=\n"
    )
    return tmp_path


def submit(cluster: Cluster, folder: Path, *arguments: str, script: str = "pretrain.sbatch", **variables: str) -> str:
    options = (
        *("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G", "--time=5"),
        f"--output={folder}/%j.log",
    )
    command = ("sbatch", "--parsable", *options, str(ROOT / "slurm" / script), *arguments)
    return cluster.run(*command, cwd=ROOT, VLORA_SITE=str(folder / "site.sh"), **variables)


def calls(folder: Path, module: str) -> list[list[str]]:
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [c for c in map(eval, lines) if c[0] == module]


def test_overrides_arrive_literally(cluster: Cluster, fake_python: Path) -> None:
    (fake_python / "plan").write_text("0 DONE")
    odd = [
        "a=two words",
        "b='single' \"double\"",
        f"c=$(touch {fake_python}/ran)",
        "d=`id`;$HOME",
        "e=*",
        "",
        "f=new\nline",
    ]
    job = submit(cluster, fake_python, *odd)
    assert cluster.finish(job, 60) == "COMPLETED"
    (call,) = calls(fake_python, "train")
    assert call[-len(odd) :] == odd
    assert "launch.workers=4" in call and "stage=pretrain" in call
    assert not (fake_python / "ran").exists()


def test_first_host_is_the_master_of_both_steps(cluster: Cluster, fake_python: Path) -> None:
    (fake_python / "plan").write_text("0 DONE")
    job = submit(cluster, fake_python)
    cluster.finish(job, 60)
    assert {
        call[1] for module in ("train", "train.preflight", "train.worker") for call in calls(fake_python, module)
    } == {"n1"}


def test_stopped_is_requeued_and_composes_once(cluster: Cluster, fake_python: Path) -> None:
    (fake_python / "plan").write_text("0 STOPPED=SIGUSR1\n0 DONE")
    job = submit(cluster, fake_python)
    assert cluster.finish(job, 90) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"
    assert len(calls(fake_python, "train")) == 1 and len(calls(fake_python, "train.worker")) == 2


def test_user_error_is_not_requeued(cluster: Cluster, fake_python: Path) -> None:
    (fake_python / "plan").write_text("2")
    job = submit(cluster, fake_python)
    assert cluster.finish(job, 90) == "FAILED"
    assert cluster.show(job)["Restarts"] == "0"
    assert "restart does not cure" in (fake_python / "run/FAILED").read_text()


def test_crash_at_one_step_ends_crashes_further_on_do_not(cluster: Cluster, fake_python: Path) -> None:
    plan = ['1 metrics.jsonl={"step":_5}', '1 metrics.jsonl={"step":_9}', '1 metrics.jsonl={"step":_9}']
    (fake_python / "plan").write_text("\n".join(plan))
    job = submit(cluster, fake_python)
    assert cluster.finish(job, 120) == "FAILED"
    assert cluster.show(job)["Restarts"] == "2"
    assert "no further than the crash before (step 9)" in (fake_python / "run/FAILED").read_text()
    steps = [line.split()[0] for line in (fake_python / "run/crashes").read_text().splitlines()]
    assert steps == ["5", "9", "9"]


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, fake_python: Path) -> None:
    """Its workers have stopped with a checkpoint, but by then the job is its user's no more."""
    (fake_python / "plan").write_text("0 sleep=2 STOPPED=SIGTERM")
    job = submit(cluster, fake_python)
    assert wait(lambda: calls(fake_python, "train.worker") != [], 60)
    cluster.run("scancel", job)
    assert cluster.finish(job, 60) == "CANCELLED"
    assert cluster.show(job)["Restarts"] == "0"
    log = (fake_python / f"{job}.log").read_text()
    assert "got SIGTERM" in log and "nothing to do here" in log and (fake_python / "run/STOPPED").exists()


def test_requeue_limit(cluster: Cluster, fake_python: Path) -> None:
    (fake_python / "plan").write_text("0 STOPPED=SIGUSR1")
    job = submit(cluster, fake_python, VLORA_MAX_REQUEUES="1")
    assert cluster.finish(job, 90) == "FAILED"
    assert cluster.show(job)["Restarts"] == "1"


def test_only_the_stopped_element_of_an_array_is_requeued(cluster: Cluster, fake_python: Path) -> None:
    """The last element, whose SLURM_JOB_ID is the array's."""
    sweep = fake_python / "sweep"
    for i in range(3):
        (sweep / str(i)).mkdir(parents=True)
    (fake_python / "plan").write_text("0 DONE")
    stopping = fake_python / "python"
    text = stopping.read_text().replace(
        "    action =", '    plan = ["0 STOPPED=x", "0 DONE"] if run.name == "2" else plan\n    action ='
    )
    stopping.write_text(text)
    options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G", "--time=5")
    command = (
        *("sbatch", "--parsable", *options, "--array=0-2", f"--output={fake_python}/%a.log"),
        *(str(ROOT / "slurm/pretrain.sbatch"), "--sweep", str(sweep)),
    )
    job = cluster.run(*command, cwd=ROOT, VLORA_SITE=str(fake_python / "site.sh"))
    assert cluster.finish(job, 120) == "COMPLETED"
    restarts = [cluster.show(f"{job}_{i}")["Restarts"] for i in range(3)]
    assert restarts == ["0", "0", "1"]
    assert all((sweep / str(i) / "DONE").exists() for i in range(3))


def test_array_of_data_preparation(cluster: Cluster, tmp_path: Path) -> None:
    """Each task writes its part of the shards, the last to end the manifest; numbered from any first task."""
    (tmp_path / "site.sh").write_text(f"export VLORA_PYTHON={sys.executable} VLORA_PREFLIGHT=0\n")
    options = ("--array=3-4", "--cpus-per-task=1", "--mem=1G", f"--output={tmp_path}/%a.log")
    source = ("source=synthetic", "source.samples=40", "source.samples_per_shard=10", f"root={tmp_path}/data")
    command = ("sbatch", "--parsable", *options, str(ROOT / "slurm/data_prep.sbatch"), *source)
    job = cluster.run(*command, cwd=ROOT, VLORA_SITE=str(tmp_path / "site.sh"))
    assert cluster.finish(job, 120) == "COMPLETED", "".join(f.read_text() for f in tmp_path.glob("*.log"))
    assert len(Split(tmp_path / "data/synthetic/train")) == 40
    logs = [(tmp_path / f"{i}.log").read_text() for i in (3, 4)]
    assert any("made: 40 samples" in log for log in logs), logs


def test_submitted_from_elsewhere_says_so(cluster: Cluster, tmp_path: Path) -> None:
    script = str(ROOT / "slurm/pretrain.sbatch")
    job = cluster.run("sbatch", "--parsable", "--gpus-per-node=0", f"--output={tmp_path}/log", script, cwd=tmp_path)
    assert cluster.finish(job, 30) == "FAILED"
    assert "submit from the repository's root" in (tmp_path / "log").read_text()


STUBBORN = """
import signal, sys
from pathlib import Path
from tests.slurm.cluster import Cluster, wait
cluster = Cluster(Path(sys.argv[1]), nodes=1, prefix='m')
cluster.start()
job = cluster.run("sbatch", "--parsable", "--output=/dev/null", sys.argv[2])
assert wait(lambda: cluster.state(job) == "RUNNING", 20)
print("running", flush=True)
if sys.argv[3] == "stop":
    cluster.stop()
else:
    signal.pause()
"""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_nothing_is_left_behind(tmp_path: Path, cluster: Cluster, end: str) -> None:
    """A second cluster comes up beside the first, runs a job that ignores signals, and is gone in the end.

    Also where nobody stops it, because the process that had started it was killed.
    """
    script = tmp_path / "stubborn.sh"
    script.write_text("#!/bin/bash\ntrap '' TERM\nsleep 300\nsleep 300\n")
    root = tmp_path / "second"
    owner = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, str(root), str(script), end], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "running\n"
    if end == "kill":
        owner.kill()
    assert owner.wait(60) == (-signal.SIGKILL if end == "kill" else 0)
    owner.stdout.close()
    assert wait(lambda: not processes_below(root), 30 if end == "kill" else 0), processes_below(root)


def processes_below(root: Path) -> list[str]:
    """Processes that carry the folder in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(root).encode() in words and int(folder.name) != os.getpid():
            found.append(words.decode(errors="replace")[:200])
    return found


def test_evaluation_of_a_point(cluster: Cluster, fake_python: Path) -> None:
    options = ("--array=3", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G")
    command = ("sbatch", "--parsable", *options, f"--output={fake_python}/log", str(ROOT / "slurm/evaluate.sbatch"))
    job = cluster.run(*command, "--sweep", "/sweep", "images=none", cwd=ROOT, VLORA_SITE=str(fake_python / "site.sh"))
    assert cluster.finish(job, 60) == "COMPLETED"
    (call,) = calls(fake_python, "train.evaluate")
    assert call[2:] == ["run=/sweep/3", "images=none"]


def test_a_suite_of_benchmarks_is_one_process(cluster: Cluster, fake_python: Path) -> None:
    options = ("--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=1G")
    command = ("sbatch", "--parsable", *options, f"--output={fake_python}/log", str(ROOT / "slurm/evaluate.sbatch"))
    job = cluster.run(*command, "run=/r", "suite=paper", "limit=4", cwd=ROOT, VLORA_SITE=str(fake_python / "site.sh"))
    assert cluster.finish(job, 60) == "COMPLETED"
    (call,) = calls(fake_python, "train.benchmark")
    assert call[2:] == ["run=/r", "suite=paper", "limit=4"]
    assert not calls(fake_python, "train.evaluate")
