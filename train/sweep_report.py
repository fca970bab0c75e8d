"""`python -m train.sweep_report SWEEP_DIR`: every point of a sweep as table and plots, at any time.

Writes report.md, points.csv, accuracy.png, loss.png and speed.png into SWEEP_DIR and logs them to the sweep's wandb
group. With `--evaluate`, finished points without a score are scored first, here.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import places
from common.errors import UserError, run_cli
from common.files import read_json, write_atomically
from common.markdown import plain
from train import config as configuration
from train.cluster import slurm, sweep
from train.measure.tracking import read_metrics, start_wandb
from train.process.run_files import RunDir

_COLUMNS = (
    "point",
    "state",
    "overrides",
    "rank",
    "blocks",
    "types",
    "step",
    "loss",
    "accuracy",
    "samples_per_s",
    "why",
)
_FIGURES = {"accuracy": "accuracy, %", "loss": "loss, mean of the last 10 steps", "samples_per_s": "samples/s"}


def collect(folder: Path) -> list[dict[str, Any]]:
    """One row per point of the sweep, `_COLUMNS` as keys; what is not known is None."""
    jobs = folder / sweep.JOBS
    array = read_json(jobs, "remove it").get("train") if jobs.exists() else None
    queued = slurm.states(array) if array else {}
    return [
        _row(folder / str(index), index, overrides, queued.get(f"{array}_{index}"))
        for index, overrides in sweep.points(folder).items()
    ]


def _row(run: Path, index: int, overrides: list[str], queued: str | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_COLUMNS) | {"point": index, "overrides": overrides}
    row["state"], row["why"] = _state(run, queued)
    if RunDir(run).config.exists():
        config = configuration.load(RunDir(run).config)
        generator = config.generator
        row |= {"rank": generator.rank, "blocks": generator.num_blocks, "types": generator.types}
    records = [r for r in read_metrics(run) if "loss" in r]
    if records:
        last = records[-10:]
        steady = sorted(r["samples_per_s"] for r in records[2:] or records)
        row |= {
            "step": records[-1]["step"],
            "loss": sum(r["loss"] for r in last) / len(last),
            "samples_per_s": steady[len(steady) // 2],
        }
    score = run / "evaluation/test-real.json"
    if score.exists():
        row["accuracy"] = read_json(score, "evaluate the point again")["accuracy"]["overall"]["percent"]
    return row


def _state(run: Path, queued: str | None) -> tuple[str, str | None]:
    """State and, for a failed point, the reason."""
    if RunDir(run).done.exists():
        return "finished", None
    if RunDir(run).failed.exists():
        return "failed", RunDir(run).failed.read_text().strip()
    if not RunDir(run).config.exists():
        return "failed", "refused before it started; run it alone to see why"
    if queued in ("PENDING", "CONFIGURING", "REQUEUED"):
        return "waiting", None
    if queued in ("RUNNING", "COMPLETING", "SUSPENDED"):
        return "running", None
    if queued == "CANCELLED":
        return "cancelled", None
    if queued is not None:
        return "failed", f"SLURM says {queued}; see its log in slurm/logs"
    return ("stopped", None) if RunDir(run).stopped.exists() else ("unfinished", None)


def varied(rows: list[dict[str, Any]]) -> list[str]:
    """Keys of the overrides that differ between points."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for override in row["overrides"]:
            key, _, value = override.partition("=")
            seen.setdefault(key.lstrip("+"), set()).add(value)
    return [key for key, values in seen.items() if len(values) > 1]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write table, CSV and plots; returns the report's path."""
    with (folder / "points.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "overrides": " ".join(row["overrides"])} for row in rows)
    keys = varied(rows)
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [f"# Sweep {plain(folder.name)}", "", f"{len(rows)} points: {counts}.", ""]
    head = ["point", *keys, "state", "step", "loss", "accuracy %", "samples/s"]
    lines += ["| " + " | ".join(map(plain, head)) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        values = dict(o.lstrip("+").partition("=")[::2] for o in row["overrides"])
        cells = [row["point"], *(values.get(k) for k in keys), row["state"], row["step"]]
        figures = [_number(row["loss"], 4), _number(row["accuracy"], 1), _number(row["samples_per_s"], 2)]
        lines.append("| " + " | ".join("" if c is None else plain(c) for c in [*cells, *figures]) + " |")
    failed = [row for row in rows if row["why"]]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {row['point']} ({plain(' '.join(row['overrides']))}): {plain(row['why'])}" for row in failed]
    for name in _FIGURES:
        if _plot(rows, name, folder / f"{_file(name)}.png"):
            lines += ["", f"![{_FIGURES[name]}]({_file(name)}.png)"]
    path = folder / "report.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _file(figure: str) -> str:
    return "speed" if figure == "samples_per_s" else figure


def _plot(rows: list[dict[str, Any]], figure: str, file: Path) -> bool:
    """One figure against rank and against blocks (against types where only these vary); False without points."""
    known = [row for row in rows if row[figure] is not None and row["rank"] is not None]
    if not known:
        return False
    axes_names = ["rank", "blocks"] if len({(r["rank"], r["blocks"]) for r in known}) > 1 else ["types"]
    canvas, axes = plt.subplots(1, len(axes_names), figsize=(5 * len(axes_names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], axes_names, strict=True):
        others = [n for n in ("rank", "blocks", "types") if n != name]
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in known:
            differs = [n for n in others if len({r[n] for r in known}) > 1]
            lines.setdefault(", ".join(f"{n} {row[n]}" for n in differs), []).append(row)
        for label, members in lines.items():
            members = sorted(members, key=lambda r: r[name])
            axis.plot([r[name] for r in members], [r[figure] for r in members], "o-", label=label)
        axis.set_xlabel(name)
        axis.set_ylabel(_FIGURES[figure])
        if name == "rank":
            axis.set_xscale("log", base=2)
        if any(lines):
            axis.legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(file, dpi=120)
    plt.close(canvas)
    return True


def log_to_wandb(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The table and plots as one run of the sweep's group; nothing where the sweep does not use wandb."""
    configs = [RunDir(folder / str(row["point"])).config for row in rows]
    first = next((configuration.load(c).tracking for c in configs if c.exists()), None)
    if first is None or first.wandb == "disabled":
        return
    run = start_wandb(first, folder, f"{folder.name}-report", job_type="report")
    import wandb

    cells = [[" ".join(r[c]) if c == "overrides" else r[c] for c in _COLUMNS] for r in rows]
    images = {
        _file(n): wandb.Image(str(folder / f"{_file(n)}.png"))
        for n in _FIGURES
        if (folder / f"{_file(n)}.png").exists()
    }
    run.log({"points": wandb.Table(columns=list(_COLUMNS), data=cells), **images})
    run.finish()


def main() -> int:
    """Parse the command line, collect, write."""
    parser = argparse.ArgumentParser(prog="python -m train.sweep_report", description=__doc__.splitlines()[0])
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("--evaluate", action="store_true", help="score finished points that have no score yet")
    parser.add_argument("--max-samples", type=int, help="questions per point with --evaluate; default all")
    arguments = parser.parse_args()
    folder: Path = arguments.sweep_dir.absolute()
    rows = collect(folder)
    if arguments.evaluate:
        limit = [f"max_samples={arguments.max_samples}"] if arguments.max_samples else []
        for row in rows:
            if row["state"] == "finished" and row["accuracy"] is None:
                command = [sys.executable, "-m", "train.evaluate", f"run={folder / str(row['point'])}", *limit]
                if subprocess.run(command, cwd=places.CHECKOUT).returncode:
                    raise UserError(f"point {row['point']} could not be scored; the reason stands above")
        rows = collect(folder)
    path = write(folder, rows)
    log_to_wandb(folder, rows)
    print(path.read_text().split("\n\n![")[0])
    print(f"\nreport: {path}")
    return 0


if __name__ == "__main__":
    run_cli(main)
