"""Both stages of a sweep by one command, as far as it goes without a cluster."""

import os
import shlex
import shutil
import signal

import pytest

from common.files import DamagedFile
from tests.train import world
from train import config as configuration
from train.cluster import sweep
from train.process.run_files import RunDir


def test_stage_two_of_a_sweep_is_prepared_and_waits_for_stage_one_point_by_point(tmp_path):
    home, folder = world.make(tmp_path / "world"), tmp_path / "sweep"
    ours = [o for o in world.overrides(home, tmp_path) if not o.startswith(("run_dir", "launch.threads"))]
    slurm = ["hydra/launcher=slurm", "hydra.launcher.submit=false", "hydra.launcher.tasks_per_node=2"]
    both = ["hydra.launcher.finetune=true", "hydra.launcher.throttle=1", "data.test=squares/val"]
    done = world.train(["-m", *ours, *slurm, *both, "generator.rank=2,4", "seed=0,1", f"hydra.sweep.dir={folder}"])
    assert done.returncode == 0, done.stderr
    first, second, scored = (shlex.split(line) for line in (folder / "submit.txt").read_text().splitlines())
    assert first[-3:] == ["slurm/pretrain.sbatch", "--sweep", str(folder)] and "--array=0-3%1" in first
    assert second[-3:] == ["slurm/finetune.sbatch", "--sweep", f"{folder}/finetune"]
    assert {"--dependency=aftercorr:{train}", "--array=0-3%1", "--job-name=vlora-sweep-finetune"} <= set(second)
    assert scored[-1] == f"{folder}/finetune" and "--dependency=aftercorr:{finetune}" in scored
    for number in range(4):
        one, two = (configuration.read(folder / f"{where}{number}/config.yaml") for where in ("", "finetune/"))
        assert (one.stage.name, two.stage.name) == ("pretrain", "finetune")
        assert (one.tracking.group, two.tracking.group) == ("sweep", "sweep/finetune")
        values = f"rank={one.generator.rank} seed={one.seed}"
        assert (
            one.tracking.name == f"sweep/{number} {values}" and two.tracking.name == f"sweep/finetune/{number} {values}"
        )
        assert two.init_from == str(folder / str(number)) and two.generator == one.generator and two.seed == one.seed
    done = world.train(
        ["-m", *ours, *slurm, *both, "stage=finetune", "init_from=x", f"hydra.sweep.dir={tmp_path}/other"]
    )
    assert done.returncode == 2 and "follows a pretraining, but this sweep has stage=finetune" in done.stderr


def test_both_stages_of_a_sweep_run_here_by_one_command_and_again_only_what_is_missing(tmp_path):
    home, folder = world.make(tmp_path / "world"), tmp_path / "sweep"
    ours = [o for o in world.overrides(home, tmp_path) if not o.startswith("run_dir")]
    command = ["-m", *ours, "stage.steps=2", "generator.rank=2,4", "hydra.launcher.finetune=true"]
    done = world.train([*command, f"hydra.sweep.dir={folder}"])
    assert done.returncode == 0, done.stderr
    second = sweep.points(folder / "finetune")
    assert ["generator.rank=2" in second[0], "generator.rank=4" in second[1]] == [True, True]
    for number in range(2):
        two = configuration.read(folder / f"finetune/{number}/config.yaml")
        assert two.init_from == str(folder / str(number)) and RunDir(folder / f"finetune/{number}").done.exists()
    trained = (folder / "0/export/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(folder / "finetune/1")
    again = world.train([*command, f"hydra.sweep.dir={folder}"])
    assert again.returncode == 0, again.stderr
    assert (folder / "0/export/model.safetensors").stat().st_mtime_ns == trained
    assert RunDir(folder / "finetune/1").done.exists() and len(sweep.points(folder / "finetune")) == 2
    wrong = world.train([*command, "stage=finetune", "init_from=x", f"hydra.sweep.dir={tmp_path}/other"])
    assert wrong.returncode == 2 and "follows a pretraining, but this sweep has stage=finetune" in wrong.stderr


def test_a_wrong_point_ends_the_sweep_before_the_first_one_begins(tmp_path):
    """The last of three, too wide; the second of two, which does not divide among the ranks."""
    home = world.make(tmp_path / "world")
    ours = [o for o in world.overrides(home, tmp_path) if not o.startswith("run_dir")]
    command = ["-m", *ours, "launch.workers=1", "stage.steps=2", "hydra.launcher.finetune=true"]
    for swept, said in (
        ("generator.rank=2,4,64", "generator.rank=64 is above the width of"),
        ("data.batch_size=8,7", "data.batch_size=7"),
    ):
        folder = tmp_path / swept.partition("=")[0]
        two = ["launch.workers=2"] if "batch" in swept else []
        done = world.train([*command, *two, swept, f"hydra.sweep.dir={folder}"])
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert (folder / "0/config.yaml").exists() and not list(folder.rglob("metrics.jsonl"))


def test_who_stops_a_point_stops_the_sweep_and_its_command_goes_on(tmp_path):
    home = world.make(tmp_path / "world")
    ours = [o for o in world.overrides(home, tmp_path) if not o.startswith("run_dir")]
    command = ["-m", *ours, "launch.workers=1", "stage.steps=20", "generator.rank=2,4"]
    command += ["hydra.launcher.finetune=true", f"output_root={tmp_path}"]
    process = world.start(command)
    world.wait_for(lambda: any(map(world.steps_done, tmp_path.glob("sweeps/*/0"))), process)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.wait(300)
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert process.returncode == 0, err
    assert f"the same command with hydra.sweep.dir={folder} goes on" in out
    others = (folder / "1", folder / "finetune/0", folder / "finetune/1")  # prepared, and not begun
    assert RunDir(folder / "0").stopped.exists() and not any(RunDir(other).metrics.exists() for other in others)

    process = world.start([*command, f"hydra.sweep.dir={folder}"])
    second = folder / "finetune"
    world.wait_for(lambda: world.steps_done(second / "0") > 0, process)
    assert all(RunDir(folder / name).done.exists() for name in "01")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.wait(300)
    assert process.returncode == 0 and "the same command goes on" in out, err
    assert RunDir(second / "0").stopped.exists() and not RunDir(second / "1").metrics.exists()
    done = world.train([*command, f"hydra.sweep.dir={folder}"])
    assert done.returncode == 0, done.stderr
    assert all(RunDir(second / name).done.exists() for name in "01")


@pytest.mark.parametrize(
    "line", ["x", "3", '{"index": 1}', '{"index": "one", "overrides": []}', '{"index": 1, "overrides": 2}']
)
def test_a_damaged_manifest_is_named(tmp_path, line):
    (tmp_path / sweep.MANIFEST).write_text(f'{{"index": 0, "overrides": ["seed=1"]}}\n{line}\n')
    with pytest.raises(DamagedFile, match=f"{sweep.MANIFEST}.*restore it, or submit the sweep again"):
        sweep.points(tmp_path)


@pytest.mark.parametrize(
    ("value", "swept"),
    [("2,4", True), ("range(1,3)", True), ("[a],[b,c]", True), ("[{path: a, weight: 1},{path: b}]", False)]
    + [("/models/a(1)", False), ("'a,b'", False), ("qkv", False)],
)
def test_a_points_name_holds_what_is_swept(value, swept):
    assert sweep._is_swept(value) == swept
