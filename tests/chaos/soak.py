"""A long run with evaluations, checkpoints and kills, watched from outside: what it holds and how fast it is."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.train import world
from train.measure.tracking import read_metrics


@dataclass(frozen=True)
class Reading:
    """What the ranks of a run hold together at one moment."""

    step: int
    memory: float
    descriptors: int
    threads: int


def soak(home: Path, run: Path, steps: int, kills: int, ranks: int = 2) -> list[str]:
    """Run `steps` steps, killed `kills` times; the lines of a table of growth from an early to a late part."""
    words = world.overrides(
        home, run, f"stage.steps={steps}", f"checkpoint.every={max(10, steps // 50)}", "data.val=squares/val",
        "tracking.num_samples=2", f"evaluation.every={max(10, steps // 20)}", f"launch.workers={ranks}",
        "data.num_workers=1",
    )  # fmt: skip
    lines = [
        "| lifetime | steps | memory MiB | growth % | descriptors | threads | step ms | growth % |",
        "|---" * 8 + "|",
    ]
    for life in range(kills + 1):
        process = world.start(words)
        readings: list[Reading] = []
        until = steps * (life + 1) // (kills + 1)
        while process.returncode is None:
            step = world.steps_done(run)
            if life < kills and step >= until:
                world.kill_tree(process)
                break
            if readings is not None and step and (not readings or step > readings[-1].step):
                readings += _read(process.pid, step, ranks)
            time.sleep(1.0)
        else:
            _, errors = process.wait(10)
            if process.returncode:
                raise RuntimeError(errors[-2000:])
        lines.append(_row(life, readings, run))
    return lines


def _read(pid: int, step: int, ranks: int) -> list[Reading]:
    try:
        family = psutil.Process(pid).children(recursive=True)
        memory = sum(p.memory_info().rss for p in family) / 2**20
        return [Reading(step, memory, sum(p.num_fds() for p in family), sum(p.num_threads() for p in family))]
    except psutil.Error:
        return []


def _row(life: int, readings: list[Reading], run: Path) -> str:
    # The first quarter of a lifetime fills caches and pools.
    settled = readings[len(readings) // 4 :]
    early, late = settled[: max(1, len(settled) // 3)], settled[-max(1, len(settled) // 3) :]
    times = {r["step"]: r["seconds"] for r in read_metrics(run) if "seconds" in r}

    def step_ms(part: list[Reading]) -> float:
        known = sorted(step for step in times if part[0].step <= step <= part[-1].step)
        if len(known) < 2:
            return float("nan")
        return 1000 * (times[known[-1]] - times[known[0]]) / (known[-1] - known[0])

    def median(part: list[Reading], name: str) -> float:
        return statistics.median(getattr(reading, name) for reading in part)

    memory, speed = (median(early, "memory"), median(late, "memory")), (step_ms(early), step_ms(late))
    descriptors, threads = (f"{median(early, n):.0f} -> {median(late, n):.0f}" for n in ("descriptors", "threads"))
    growth = [100 * (late_value / early_value - 1) for early_value, late_value in (memory, speed)]
    return (
        f"| {life} | {readings[0].step}-{readings[-1].step} | {memory[0]:.0f} | {growth[0]:.2f} | {descriptors} "
        f"| {threads} | {speed[0]:.1f} | {growth[1]:.1f} |"
    )
