"""Report of a demo or comparison: `report.md`, four pictures and `summary.json`, from what the runs wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from common.files import read_json, write_atomically
from train.measure.tracking import read_metrics
from train.process.run_dir import read_record
from train.process.run_files import RunDir

PHASES = ("data", "vision", "connector", "llm", "backward", "optimizer")
_COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def stage_figures(run: Path) -> dict[str, Any]:
    """Speed and size of one stage, from its metrics: medians over the steps after the first two (warm-up)."""
    records = _steps(run)
    steady = records[2:] or records
    system = [r for r in records if "memory/host_gib" in r]

    def median(key: str) -> float:
        values = sorted(r[key] for r in steady if key in r)
        return values[len(values) // 2] if values else 0.0

    facts = read_json(RunDir(run).facts, "start the run again, which writes it anew")
    return {
        "world_size": facts["world_size"],
        "zero_stage": facts["zero_stage"],
        "steps": records[-1]["step"],
        "final_loss": sum(r["loss"] for r in records[-10:]) / len(records[-10:]),
        "samples_per_s": median("samples_per_s"),
        "tokens_per_s": median("tokens_per_s"),
        "step_seconds": {phase: median(f"time/{phase}") for phase in PHASES},
        "training_seconds": records[-1]["seconds"],
        "skipped_steps": records[-1]["skipped_steps"],
        "padding_fraction": median("padding_fraction"),
        "padding_fraction_of_rows": median("padding_fraction_of_rows"),
        "image_share": next((r["image_share"] for r in reversed(records) if "image_share" in r), None),
        "rank_memory_gib": max((r["memory/host_gib"] for r in system), default=0.0),
        "vision_features_cached": facts["vision_features_cached"],
    }


def plot_losses(runs: dict[str, dict[str, Path]], file: Path) -> None:
    """Loss against step: one panel per stage, one line per connector."""
    stages = list(next(iter(runs.values())))
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.5), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        for (connector, paths), color in zip(runs.items(), _COLORS, strict=False):
            records = _steps(paths[stage])
            steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
            axis.plot(steps, losses, color=color, alpha=0.3, linewidth=1)
            axis.plot(steps, _smooth(losses), color=color, label=connector)
        axis.set(title=stage, xlabel="step", ylabel="loss per target token (nats)")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    _save(figure, file)


def plot_accuracy(results: dict[str, dict[str, Any]], floor: dict[str, Any], file: Path) -> None:
    """Accuracy bars per answer type, with 95 % intervals, next to the blind floor and the wrong-image control."""
    types = list(floor)
    bars = [("blind floor", floor)]
    for connector, result in results.items():
        bars.append((connector, result["real"]["accuracy"]))
        if "shuffled" in result:
            bars.append((f"{connector}, wrong image", result["shuffled"]["accuracy"]))
    width = 0.8 / len(bars)
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for i, (label, values) in enumerate(bars):
        heights = [values[t]["percent"] for t in types]
        errors = [
            [values[t]["percent"] - values[t]["low"] for t in types],
            [values[t]["high"] - values[t]["percent"] for t in types],
        ]
        places = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(types))]
        axis.bar(places, heights, width, yerr=errors, capsize=2, label=label, color=("0.7", *_COLORS)[i % 7])
    axis.set_xticks(range(len(types)), types)
    axis.set(ylabel="accuracy, %", ylim=(0, 105))
    axis.legend(frameon=False, fontsize=8, ncol=len(bars), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    _save(figure, file)


def plot_step_time(stages: dict[str, dict[str, float]], file: Path) -> None:
    """Seconds per step split into phases, one bar per stage."""
    figure, axis = plt.subplots(figsize=(7, 0.6 * len(stages) + 1.4))
    for y, seconds in enumerate(stages.values()):
        left = 0.0
        for phase, color in zip(PHASES, _COLORS, strict=True):
            axis.barh(y, seconds[phase], left=left, color=color, label=phase if y == 0 else None)
            left += seconds[phase]
    axis.set_yticks(range(len(stages)), list(stages))
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step (median, rank 0)")
    axis.legend(frameon=False, fontsize=8, ncol=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, 1.3))
    _save(figure, file)


def plot_samples(predictions: list[dict[str, Any]], image_of: Callable[[str], bytes], file: Path) -> None:
    """A grid of test images with question, prediction and, where it is wrong, the reference."""
    columns = 4
    rows = -(-len(predictions) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, item in zip(axes.flat, predictions, strict=False):
        axis.imshow(Image.open(io.BytesIO(image_of(item["sample"]))).convert("RGB"))
        text = item["prediction"] if item["right"] else f"{item['prediction']}  (is: {item['answer']})"
        axis.set_title(f"{item['question']}\n{text}", fontsize=8, color="#2a7f3f" if item["right"] else "#b03030")
    _save(figure, file)


def varied(predictions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` predictions of distinct samples, taken in turn from every answer type."""
    by_type: dict[str, list[dict[str, Any]]] = {}
    for item in predictions:
        by_type.setdefault(item["type"], []).append(item)
    chosen: list[dict[str, Any]] = []
    seen: set[str] = set()
    for turn in zip(*by_type.values(), strict=False):
        for item in turn:
            if item["sample"] not in seen and len(chosen) < count:
                seen.add(item["sample"])
                chosen.append(item)
    return chosen


def write(out: Path, summary: dict[str, Any]) -> Path:
    """Write `summary.json` and `report.md` in `out`; the pictures stand there already."""
    write_atomically(out / "summary.json", json.dumps(summary, indent=1))
    lines = ["# VLoRA on easy-VQA", ""]
    evaluation = next(iter(summary["connectors"].values()))["evaluation"]["real"]
    lines += [
        f"LLM `{summary['llm']}`, vision `{summary['vision']}`; official test images, "
        f"{evaluation['count']} of {evaluation['available']} questions"
        + (" (fixed random subset)." if evaluation["count"] < evaluation["available"] else "."),
        "The blind floor is the best answer from the question text alone.",
        "",
    ]
    types = list(summary["blind_floor"])
    lines += ["| | " + " | ".join(types) + " |", "|---" * (len(types) + 1) + "|"]
    lines.append(_row("questions", [str(evaluation["accuracy"][t]["count"]) for t in types]))
    lines.append(_row("blind floor", [f"{summary['blind_floor'][t]['percent']:.1f}" for t in types]))
    for name, result in summary["connectors"].items():
        for images, label in (("real", name), ("shuffled", f"{name}, wrong image")):
            if images in result["evaluation"]:
                values = result["evaluation"][images]["accuracy"]
                cells = [f"{values[t]['percent']:.1f} ({values[t]['low']:.1f}-{values[t]['high']:.1f})" for t in types]
                lines.append(_row(label, cells))
    lines += ["", "Percent right, with 95 % Wilson intervals.", "", "![accuracy](accuracy.png)", ""]
    lines += ["![losses](losses.png)", "", "![samples](samples.png)", "", "## Cost", ""]
    lines += [
        "| stage | steps | samples/s | tokens/s | wall s | core s | peak GB | ranks | ZeRO |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in summary["connectors"].items():
        for stage, figures in result["stages"].items():
            cost = summary["steps"][f"{stage} {name}"]
            cells = [
                str(figures["steps"]),
                f"{figures['samples_per_s']:.1f}",
                f"{figures['tokens_per_s']:.0f}",
                f"{cost['seconds']:.0f}",
                f"{cost['core_seconds']:.0f}",
                f"{cost['peak_gb']:.2f}",
                str(figures["world_size"]),
                str(figures["zero_stage"]),
            ]
            lines.append(_row(f"{name} {stage}", cells))
    for name, result in summary["connectors"].items():
        for stage, figures in result["stages"].items():
            without, computed = figures["padding_fraction_of_rows"], figures["padding_fraction"]
            lines += [
                "",
                f"{name} {stage}: {computed:.1%} of the LLM's positions are padding; in padded rows {without:.1%}.",
            ]
    others = {k: v for k, v in summary["steps"].items() if not k.startswith(("pretrain", "finetune"))}
    lines += ["", "| step | wall s | core s | peak GB |", "|---|---|---|---|"]
    for name, cost in others.items():
        lines.append(_row(name, [f"{cost['seconds']:.0f}", f"{cost['core_seconds']:.0f}", f"{cost['peak_gb']:.2f}"]))
    cached = any(s["vision_features_cached"] for r in summary["connectors"].values() for s in r["stages"].values())
    lines += ["", "![step time](step_time.png)", ""]
    if cached:
        lines.append("The frozen encoder's features are computed once and cached (`vision.cache=true`), so the step's")
        lines.append("vision time is zero; the first stage pays for the cache.")
    versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
    lines += ["", f"Commit {summary['git_commit']}; {versions}.", ""]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def run_identity(run: Path) -> dict[str, Any]:
    """Commit and versions of a run."""
    record = read_record(run)
    return {"git_commit": record["git_commit"], "git_dirty": record["git_dirty"], "versions": record["versions"]}


def _steps(run: Path) -> list[dict[str, Any]]:
    """Records of training steps; the validation loss is a record of its own."""
    return [record for record in read_metrics(run) if "loss" in record]


def _row(head: str, cells: list[str]) -> str:
    return "| " + " | ".join([head, *cells]) + " |"


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average, unbiased at the start."""
    out, average, norm = [], 0.0, 0.0
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(average / norm)
    return out


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)
