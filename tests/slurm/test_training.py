"""Shipped batch scripts on a real SLURM: CPU ranks on two nodes under ZeRO-3, interrupted in every way.

After each interruption the losses equal those of a run that nothing interrupted, bit for bit, every step once.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import wait
from tests.slurm.conftest import STEPS, Losses, Site, last_step

pytestmark = pytest.mark.slow


def restarts(site: Site, job: str) -> int:
    return int(site.cluster.show(job)["Restarts"])


def test_two_by_two_completes_under_zero3(site: Site) -> None:
    """With preflight."""
    options = ("--ntasks-per-node=2",)
    job, run = site.pretrain(
        "two_by_two", "stage.steps=4", options=options, VLORA_PREFLIGHT="1", VLORA_MIN_FREE_GIB="0"
    )
    assert [step for step, _ in site.complete(job, run)] == [1, 2, 3, 4]
    facts = json.loads((run / "facts.json").read_text())
    assert (facts["world_size"], facts["zero_stage"]) == (4, 3)
    assert "all-reduce over 4 ranks" in site.log(job) and "links between nodes" in site.log(job)


def test_undisturbed_run(undisturbed: Losses) -> None:
    assert [step for step, _ in undisturbed] == list(range(1, STEPS + 1))


def test_signal_to_the_batch_shell(site: Site, undisturbed: Losses) -> None:
    """Also: offline wandb has one id over both lifetimes, and every step once."""
    job, run = site.pretrain("signalled", "tracking=offline")
    site.reach(run, 3)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert site.complete(job, run) == undisturbed
    assert restarts(site, job) == 1
    stopped_cleanly(site, job, run)
    ids, steps = wandb_steps(run)
    assert ids == {json.loads((run / "run.json").read_text())["id"]}
    assert steps == list(range(1, STEPS + 1))


def test_time_limit(site: Site, undisturbed: Losses) -> None:
    """Limits are looked at twice a minute and the warning may come a minute early: here at once."""
    job, run = site.pretrain("limited", options=("--time=1", "--signal=B:USR1@30"))
    assert site.complete(job, run) == undisturbed
    assert restarts(site, job) >= 1 and "got SIGUSR1" in site.log(job)
    stopped_cleanly(site, job, run)


def test_preempted_by_a_higher_partition(site: Site, undisturbed: Losses) -> None:
    """SLURM tells the tasks (SIGTERM) and not the batch shell."""
    job, run = site.pretrain("preempted")
    site.reach(run, 3)
    urgent = site.cluster.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 1",
    )
    site.cluster.finish(urgent, 120)
    assert site.complete(job, run) == undisturbed
    assert restarts(site, job) == 1
    stopped_cleanly(site, job, run)


def test_requeued_from_outside(site: Site, undisturbed: Losses) -> None:
    job, run = site.pretrain("requeued")
    site.reach(run, 3)
    site.cluster.run("scontrol", "requeue", job)
    assert site.complete(job, run) == undisturbed


def test_cancelled_by_its_user(site: Site) -> None:
    """A clean stop with a checkpoint, and no requeue."""
    job, run = site.pretrain("cancelled")
    site.reach(run, 3)
    site.cluster.run("scancel", job)
    assert site.cluster.finish(job, 60) == "CANCELLED"
    assert (run / "STOPPED").exists() and not (run / "DONE").exists()
    assert (run / f"checkpoints/step-{last_step(run):06d}/COMPLETE").exists()
    assert "nothing to do here" in site.log(job) and "requeueing" not in site.log(job)


def test_one_rank_killed(site: Site, undisturbed: Losses) -> None:
    """Ends everywhere at once, requeued once, goes on from the last checkpoint."""
    job, run = site.pretrain("killed")
    site.reach(run, 6)
    (victim,) = [p for p in workers(run) if environment(p).get("SLURM_PROCID") == "1"]
    os.kill(victim, signal.SIGKILL)
    assert wait(lambda: not workers(run), 60)
    assert site.complete(job, run) == undisturbed
    assert restarts(site, job) == 1 and len((run / "crashes").read_text().splitlines()) == 1


def test_node_down(site: Site, undisturbed: Losses) -> None:
    job, run = site.pretrain("node_down")
    site.reach(run, 6)
    site.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    assert wait(lambda: restarts(site, job) == 1, 90)
    site.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert site.complete(job, run) == undisturbed


def stopped_cleanly(site: Site, job: str, run: Path) -> None:
    """The job ended its earlier lifetime with a checkpoint, not as a crash that happened to be survived."""
    assert "stopped with a checkpoint" in site.log(job)
    assert not (run / "crashes").exists(), (run / "crashes").read_text()


def workers(run: Path) -> list[int]:
    """Processes of the ranks of a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            alive = (folder / "stat").read_text().rpartition(") ")[2][0] != "Z"
        except OSError:
            continue
        # The rank itself: srun and the shell carry the same words further on.
        if alive and words[1:4] == [b"-m", b"train.worker", str(run).encode()]:
            found.append(int(folder.name))
    return found


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.partition("=")[::2] for word in words)


def wandb_steps(run: Path) -> tuple[set[str], list[int]]:
    """Run ids of all offline lifetimes, and the training steps they logged, in order of time."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, steps = set(), []
    for file in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                if "loss" in row:
                    steps.append(int(row["step"]))
    return ids, steps


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: 7 bytes of file header, then blocks of 32 KiB holding whole or split records."""
    position, parts = 7, []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # too short for a record's header: padding
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            return
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield b"".join(parts)
            parts = []
