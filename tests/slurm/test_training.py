"""Shipped batch scripts on a real SLURM: CPU ranks on two nodes under ZeRO-3, interrupted in every way.

After each interruption the losses equal those of a run that nothing interrupted, bit for bit, every step once.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm import offline_wandb
from tests.slurm.cluster import wait
from tests.slurm.conftest import EVERY, STEPS, Site, last_step, losses


@pytest.mark.slow
def test_two_by_two_completes_under_zero3(site: Site) -> None:
    """2 nodes x 2 tasks, with preflight."""
    options = ("--ntasks-per-node=2",)
    job, run = site.pretrain(
        "two_by_two", "stage.steps=4", options=options, VLORA_PREFLIGHT="1", VLORA_MIN_FREE_GIB="0"
    )
    assert [step for step, _ in site.complete(job, run)] == [1, 2, 3, 4]
    facts = json.loads((run / "facts.json").read_text())
    assert (facts["world_size"], facts["zero_stage"]) == (4, 3)
    assert "all-reduce over 4 ranks" in site.log(job) and "links between nodes" in site.log(job)


def test_undisturbed_run(undisturbed: Path) -> None:
    assert [step for step, _ in losses(undisturbed)] == list(range(1, STEPS + 1))


@dataclass
class Interrupted:
    """The job that the tests below interrupt.

    Attributes:
        job: Its id.
        run: Its run directory.
    """

    site: Site
    job: str
    run: Path

    def submit(self) -> None:
        self.job = self.site.submit("pretrain.sbatch", "--run-dir", str(self.run))

    def restarts(self) -> int:
        return int(self.site.cluster.show(self.job)["Restarts"])

    @contextmanager
    def restart(self) -> Iterator[None]:
        """The job is training before the context and has been requeued, just once, after it."""
        self.site.reach(self.run, last_step(self.run) + 2)
        before = self.restarts()
        yield
        assert wait(lambda: self.restarts() == before + 1, 900), self.site.log(self.job)

    @contextmanager
    def clean_stop(self, told: str) -> Iterator[None]:
        """As `restart`, and the job has stopped with a checkpoint, not by a crash that happened to be survived.

        Args:
            told: The ranks are held still until this stands in the job's log once more, so that they do not finish
                while SLURM takes its time.
        """
        with self.restart():
            log = self.site.log(self.job)
            with held(self.run):
                step = last_step(self.run)
                yield
                assert wait(lambda: self.site.log(self.job).count(told) > log.count(told), 90)
        ends = "stopped with a checkpoint"
        assert self.site.log(self.job).count(ends) == log.count(ends) + 1, self.site.log(self.job)
        assert last_step(self.run) <= step + 1  # the step that was under way

    def preempt(self) -> str:
        """Let a job of a higher partition ask for the nodes; returns its id."""
        urgent = ("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
        return self.site.cluster.run(*urgent, "--wrap=sleep 1")


@pytest.fixture(scope="module")
def interrupted(site: Site, undisturbed: Path) -> Interrupted:
    job = Interrupted(site, "", site.twin(undisturbed, "interrupted", tracking="offline"))
    job.submit()
    return job


class TestOneRunInterruptedInEveryWay:
    """Each test interrupts the same run in its own way and leaves it waiting to go on; the last ones see it through."""

    def test_signal_to_the_batch_shell(self, site: Site, interrupted: Interrupted) -> None:
        with interrupted.clean_stop(told="got SIGUSR1"):
            site.cluster.run("scancel", "--batch", "--signal=USR1", interrupted.job)

    @pytest.mark.slow
    def test_time_limit(self, site: Site, interrupted: Interrupted) -> None:
        """--signal of the script's header says how long before the limit SLURM tells the batch shell."""
        with interrupted.clean_stop(told="got SIGUSR1"):
            started = datetime.fromisoformat(site.cluster.show(interrupted.job)["StartTime"])
            limit = (datetime.now() - started).seconds // 60 + 5
            site.cluster.run("scontrol", "update", f"JobId={interrupted.job}", f"TimeLimit={limit}")
        site.cluster.run("scontrol", "update", f"JobId={interrupted.job}", "TimeLimit=30")

    @pytest.mark.slow
    def test_preempted_and_the_tasks_are_told(self, site: Site, interrupted: Interrupted) -> None:
        """By SIGTERM; the batch shell gets nothing."""
        with interrupted.clean_stop(told="CANCELLED AT"):
            urgent = interrupted.preempt()
        assert site.cluster.finish(urgent, 900) == "COMPLETED"
        assert "got SIGTERM" not in site.log(interrupted.job)

    @pytest.mark.slow
    def test_preempted_and_only_the_batch_shell_is_told(self, site: Site, interrupted: Interrupted) -> None:
        with site.cluster.configured("SlurmctldParameters=preempt_send_user_signal"):
            with interrupted.clean_stop(told="got SIGUSR1"):
                urgent = interrupted.preempt()
            assert site.cluster.finish(urgent, 900) == "COMPLETED"

    @pytest.mark.slow
    def test_requeued_from_outside(self, site: Site, interrupted: Interrupted) -> None:
        """SLURM restarts the job whatever its shell does; all that is left to do is to save in time."""
        run, left_alone = interrupted.run, "requeued by SLURM itself; nothing to do here"
        with interrupted.restart():
            before = site.log(interrupted.job).count(left_alone)
            site.cluster.run("scontrol", "requeue", interrupted.job)
            assert wait(lambda: site.log(interrupted.job).count(left_alone) > before, 90), site.log(interrupted.job)
        assert (run / f"checkpoints/step-{last_step(run):06d}/COMPLETE").exists() and not (run / "crashes").exists()

    @pytest.mark.slow
    def test_cancelled_by_its_user(self, site: Site, interrupted: Interrupted) -> None:
        """A clean stop with a checkpoint, and no requeue; submitted again, the run goes on."""
        job, run = interrupted.job, interrupted.run
        site.reach(run, last_step(run) + 2)
        site.cluster.run("scancel", job)
        assert site.cluster.finish(job, 120) == "CANCELLED"
        assert (run / "STOPPED").exists() and not (run / "DONE").exists()
        assert (run / f"checkpoints/step-{last_step(run):06d}/COMPLETE").exists()
        assert "nothing to do here" in site.log(job) and not (run / "crashes").exists()
        interrupted.submit()

    def test_one_rank_killed(self, interrupted: Interrupted) -> None:
        """Ends everywhere at once, is requeued once, goes on from the last checkpoint."""
        with interrupted.restart():
            (victim,) = [p for p in workers(interrupted.run) if environment(p).get("SLURM_PROCID") == "1"]
            os.kill(victim, signal.SIGKILL)
            assert wait(lambda: not workers(interrupted.run), 60)
        assert len((interrupted.run / "crashes").read_text().splitlines()) == 1

    @pytest.mark.slow
    def test_one_rank_stands_still(self, site: Site, interrupted: Interrupted) -> None:
        """Reported with the stacks of its host's ranks in the configured time (conftest: one minute), and requeued."""
        with interrupted.restart():
            (victim,) = [p for p in workers(interrupted.run) if environment(p).get("SLURM_PROCID") == "1"]
            os.kill(victim, signal.SIGSTOP)
            assert wait(lambda: not workers(interrupted.run), 600)
        said = "error: rank 0 did not move for 60 s (engine.hang_minutes); rank 1 (n2, process "
        assert said in site.log(interrupted.job)
        # In its own log too, the last that it said.
        assert said in (interrupted.run / "logs/rank-0.log").read_text().rpartition("starts on")[2]
        assert any(file.stat().st_size for file in (interrupted.run / "hang").glob("stacks-rank-0-*.txt"))

    @pytest.mark.slow
    def test_node_down(self, site: Site, interrupted: Interrupted) -> None:
        with interrupted.restart():
            site.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        site.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")

    def test_losses_equal_the_undisturbed_run(self, site: Site, interrupted: Interrupted, undisturbed: Path) -> None:
        """Bit for bit, every step once."""
        assert site.complete(interrupted.job, interrupted.run) == losses(undisturbed)

    def test_offline_wandb_is_one_run(self, interrupted: Interrupted) -> None:
        """All lifetimes have one id, and hold every step once but those that the killed ones had not saved."""
        lifetimes = offline_wandb.read(interrupted.run)
        steps = [row["step"] for lifetime in lifetimes for row in lifetime.rows if "loss" in row]
        assert len(lifetimes) > 2 and {lifetime.id for lifetime in lifetimes} == {
            json.loads((interrupted.run / "run.json").read_text())["id"]
        }
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        crashes = interrupted.run / "crashes"
        crashed = [int(line.split()[0]) for line in crashes.read_text().splitlines()] if crashes.exists() else []
        safe = min(crashed, default=STEPS + EVERY) - EVERY
        assert all(steps.count(step) == 1 for step in steps if step <= safe), steps


@contextmanager
def held(run: Path) -> Iterator[None]:
    """The ranks of a run stand still."""
    pids = workers(run)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


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
