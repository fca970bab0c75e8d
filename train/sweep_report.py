"""`python -m train.sweep_report SWEEP_DIR`: every point of a sweep as table and plots, at any time.

Writes report.md, points.csv and pictures (training curves; accuracy, loss, validation loss and speed against the swept
values) into SWEEP_DIR and logs them to the sweep's wandb group. With `--evaluate`, finished points without a score are
scored first, here.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import places
from common.arguments import Parser, whole
from common.errors import UserError, run_cli
from common.files import read_json, write_atomically
from common.markdown import as_table, plain
from train import config as configuration
from train.cluster import slurm, sweep
from train.measure import plots, results
from train.measure.tracking import start_wandb
from train.process.run_files import RunDir

_COLUMNS = (
    "point",
    "state",
    "overrides",
    "rank",
    "blocks",
    "types",
    "parameters",
    "step",
    "loss",
    "val_loss",
    "image_share",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "samples_per_s",
    "samples_per_s_low",
    "samples_per_s_high",
    "why",
)
_FIGURES = {
    "accuracy": "accuracy, % right (95 % interval)",
    "loss": "loss, mean of the last 10 steps",
    "val_loss": "validation loss",
    "samples_per_s": "samples/s (median, middle half of the steps)",
}


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
    if not RunDir(run).config.exists():
        return row
    found = results.load([run])[0]
    generator = found.config.generator
    row |= {"rank": generator.rank, "blocks": generator.num_blocks, "types": generator.types}
    row["parameters"] = found.facts.get("parameters", {}).get("trained")
    row |= {key: found.last(key) for key in ("val_loss", "image_share")}
    if records := found.steps:
        last = records[-10:]
        steady = sorted(r["samples_per_s"] for r in records[2:] or records)
        low, middle, high = (steady[int(share * (len(steady) - 1) + 0.5)] for share in (0.25, 0.5, 0.75))
        row |= {"step": records[-1]["step"], "loss": sum(r["loss"] for r in last) / len(last)}
        row |= {"samples_per_s": middle, "samples_per_s_low": low, "samples_per_s_high": high}
    if score := found.score("test"):
        row |= {"accuracy": score.percent, "accuracy_low": score.low, "accuracy_high": score.high}
    return row


def _state(run: Path, queued: str | None) -> tuple[str, str | None]:
    """State and, for a failed point, the reason."""
    if RunDir(run).done.exists():
        return "finished", None
    if RunDir(run).failed.exists():
        return "failed", RunDir(run).failed.read_text(encoding="utf-8").strip()
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
    with (folder / "points.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "overrides": " ".join(row["overrides"])} for row in rows)
    keys = varied(rows)
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    lines = [f"# Sweep {plain(folder.name)}", "", f"{len(rows)} points: {counts}.", ""]
    figures = ("loss", "val loss", "accuracy %", "parameters", "image share", "samples/s")
    head = ["point", *keys, "state", "step", *figures]
    table = [list(map(plain, head))]
    for row in rows:
        values = _values(row)
        cells = [row["point"], *(values.get(k) for k in keys), row["state"], row["step"]]
        cells += [_number(row["loss"], 4), _number(row["val_loss"], 4), _interval(row, "accuracy")]
        cells += [None if row["parameters"] is None else f"{row['parameters']:,}", _number(row["image_share"], 3)]
        cells += [_interval(row, "samples_per_s")]
        table.append(["" if cell is None else plain(cell) for cell in cells])
    lines += [
        as_table(table),
        "",
        "Accuracy with its 95 % interval; speed: median and middle half of the steps; trained parameters.",
    ]
    failed = [row for row in rows if row["why"]]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {row['point']} ({plain(' '.join(row['overrides']))}): {plain(row['why'])}" for row in failed]
    if _plot_curves(folder, rows, keys):
        lines += ["", "![training curves](curves.png)"]
    for name in _FIGURES:
        file = folder / f"{_file(name)}.png"
        file.unlink(missing_ok=True)
        if name == "samples_per_s" and not _differs(rows):
            lines += ["", "Speed is not drawn: the points differ by no more than the steps of one point do."]
        elif _plot(rows, keys, name, file):
            lines += ["", f"![{_FIGURES[name]}]({_file(name)}.png)"]
    path = folder / "report.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _interval(row: dict[str, Any], figure: str) -> str | None:
    if row[figure] is None:
        return None
    return f"{row[figure]:.1f} ({row[f'{figure}_low']:.1f}–{row[f'{figure}_high']:.1f})"


def _values(row: dict[str, Any]) -> dict[str, str]:
    """Values of a point's overrides by key."""
    return dict(override.lstrip("+").partition("=")[::2] for override in row["overrides"])


def _file(figure: str) -> str:
    return "speed" if figure == "samples_per_s" else figure


def _differs(rows: list[dict[str, Any]]) -> bool:
    """Whether speed tells points apart: the slower half of the fastest is above the faster half of the slowest."""
    known = [row for row in rows if row["samples_per_s"] is not None]
    return bool(known) and max(r["samples_per_s_low"] for r in known) > min(r["samples_per_s_high"] for r in known)


def _plot_curves(folder: Path, rows: list[dict[str, Any]], keys: list[str]) -> bool:
    """Loss of every point against the step, smoothed alike, with the validation losses; False without steps."""
    known = [row for row in rows if row["loss"] is not None]
    if not known:
        return False
    canvas, axis = plots.plt.subplots(figsize=(8, 4.5), layout="constrained")
    runs = [results.load([folder / str(row["point"])])[0] for row in known]
    log = plots.scale_losses(axis, [v for run in runs for key in ("loss", "val_loss") for v in run.series(key)[1]])
    for number, (row, run) in enumerate(zip(known, runs, strict=True)):
        steps, losses = run.series("loss")
        color, style = plots.COLORS[number % len(plots.COLORS)], ("-", "--", ":", "-.")[number // len(plots.COLORS) % 4]
        smooth = plots.smooth(losses, max(1, len(losses) // 50), log)
        label = f"{row['point']}: " + ", ".join(f"{_short(k)} {_values(row).get(k, '')}" for k in keys)
        axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth, style, color=color, linewidth=1.6, label=label)
        axis.plot(*run.series("val_loss"), "D", color=color, markeredgecolor="black", ms=5)
    axis.xaxis.set_major_locator(plots.MaxNLocator(integer=True))
    axis.set(xlabel="step", title="training curves: mean of steps around (bold), raw (pale), validation (diamonds)")
    axis.title.set_fontsize(9)
    axis.legend(ncol=1 + len(known) // 9, fontsize=7)
    plots.save(canvas, folder / "curves.png")
    return True


def _plot(rows: list[dict[str, Any]], keys: list[str], figure: str, file: Path) -> bool:
    """One figure against the swept key of most values, a line for each choice of the others; False without points.

    Points that differ in their seed alone are repetitions: each is drawn, and the line joins their means.
    """
    known = [row for row in rows if row[figure] is not None]
    swept = [key for key in keys if key != "seed"] or keys
    if not known or not swept:
        return False
    ticks = {key: sorted({_values(row).get(key, "default") for row in known}, key=_order) for key in swept}
    x, *others = sorted(swept, key=lambda key: -len(ticks[key]))
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in known:
        lines.setdefault(", ".join(f"{_short(k)} {_values(row).get(k, 'default')}" for k in others), []).append(row)
    canvas, axis = plots.plt.subplots(figsize=(6.5, 4), layout="constrained")
    for number, (label, members) in enumerate(sorted(lines.items(), key=lambda item: _order(item[0]))):
        color = plots.COLORS[number % len(plots.COLORS)]
        shift = (number - (len(lines) - 1) / 2) * min(0.08, 0.5 / len(lines))  # so that error bars do not hide others
        places = [ticks[x].index(_values(row).get(x, "default")) for row in members]
        values = [row[figure] for row in members]
        if f"{figure}_low" in members[0]:
            errors = [[abs(row[figure] - row[f"{figure}_{end}"]) for row in members] for end in ("low", "high")]
            axis.errorbar([p + shift for p in places], values, errors, fmt="none", color=color, lw=1, capsize=3)
        axis.plot([p + shift for p in places], values, "o", color=color, ms=4)
        means = {p: [v for q, v in zip(places, values, strict=True) if q == p] for p in sorted(set(places))}
        joined = [sum(each) / len(each) for each in means.values()]
        axis.plot([p + shift for p in means], joined, "-", color=color, label=label, linewidth=1.6)
    axis.set_xticks(range(len(ticks[x])), ticks[x])
    axis.set(xlabel=x, ylabel=_FIGURES[figure], title=f"{re.split('[,(]', _FIGURES[figure])[0].strip()} by {_short(x)}")
    axis.set_xlim(-0.5, len(ticks[x]) - 0.5)
    axis.grid(axis="y", color="0.92")
    if any(lines):
        axis.legend()
    plots.save(canvas, file)
    return True


def _order(value: str) -> tuple[list[float], str]:
    """Numbers by size, other values by name."""
    found = re.findall(r"[-+]?[\d.]+(?:e[-+]?\d+)?", value)
    try:
        return [float(each) for each in found], value
    except ValueError:
        return [], value


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def log_to_wandb(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The table and plots as one run of the sweep's group; nothing where the sweep does not use wandb."""
    configs = [RunDir(folder / str(row["point"])).config for row in rows]
    first = next((configuration.load(c).tracking for c in configs if c.exists()), None)
    if first is None or first.wandb == "disabled":
        return
    run = start_wandb(first, folder, f"{folder.name}-report", job_type="report")
    import wandb

    cells = [[" ".join(r[c]) if c == "overrides" else r[c] for c in _COLUMNS] for r in rows]
    names = ["curves", *map(_file, _FIGURES)]
    images = {n: wandb.Image(str(folder / f"{n}.png")) for n in names if (folder / f"{n}.png").exists()}
    run.log({"points": wandb.Table(columns=list(_COLUMNS), data=cells), **images})
    run.finish()


def main() -> int:
    """Parse the command line, collect, write."""
    parser = Parser(prog="python -m train.sweep_report", description=__doc__.splitlines()[0])
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("--evaluate", action="store_true", help="score finished points that have no score yet")
    parser.add_argument("--max-samples", type=whole(1), help="questions per point with --evaluate; default all")
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
    print(path.read_text(encoding="utf-8").split("\n\n![")[0])
    print(f"\nreport: {path}")
    return 0


if __name__ == "__main__":
    run_cli(main)
