"""The pictures of the reports: one palette, titles and units on every one."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from train.measure.results import PHASES, Results
from train.measure.scoring import Accuracy

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")
GREY, DARK = "#bdbdbd", "#333333"
GOOD, BAD = "#2a7f3f", "#b03030"
CONTROLS = {"real": ("right image", COLORS[0]), "shuffled": ("wrong image", COLORS[1]), "none": ("no image", COLORS[5])}
_STYLE: Any = {
    "text.parse_math": False,  # a data set's text may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_MAP = "Blues"
plt.rcParams.update(_STYLE)


def training(runs: Sequence[Results], file: Path) -> None:
    """Loss with validation points, learning rates and what of A differs by image, by step; a column per stage."""
    stages: dict[str, list[Results]] = {}
    for run in runs:
        stages.setdefault(run.config.stage.name, []).append(run)
    shares = any(run.series("image_share")[0] for run in runs)
    heights = [3.4, 1.5, 1.5] if shares else [3.4, 1.5]
    figure, axes = plt.subplots(
        len(heights),
        len(stages),
        figsize=(5.6 * len(stages), sum(heights) + 1),
        squeeze=False,
        sharex="col",
        height_ratios=heights,
        layout="constrained",
    )
    for column, (stage, members) in enumerate(stages.items()):
        _losses(axes[0][column], members)
        axes[0][column].set_title(f"{stage}: loss")
        _rates(axes[1][column], members)
        if shares:
            for run, color in zip(members, _cycle(COLORS), strict=False):
                axes[2][column].plot(*run.series("image_share"), "o-", ms=3, color=color)
            axes[2][column].set(ylabel="share of A that differs\nfrom image to image", ylim=(0, 1.05))
            axes[2][column].set_title("share of A's energy that varies with the image", fontsize=9)
        axes[-1][column].set_xlabel("step")
        axes[-1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, file)


def _losses(axis: Any, runs: Sequence[Results]) -> None:
    log = scale_losses(axis, [v for run in runs for key in ("loss", "val_loss") for v in run.series(key)[1]])
    for run, color in zip(runs, _cycle(COLORS), strict=False):
        steps, losses = run.series("loss")
        axis.plot(steps, losses, color=color, linewidth=0.8 if len(steps) > 1000 else 1.8, label=run.label)
        if len(steps) >= 50:
            half = max(2, len(steps) // 50)
            label = f"{run.label}, mean of {2 * half + 1} steps around"
            axis.plot(steps, smooth(losses, half, log), color=DARK, linewidth=0.9, alpha=0.8, label=label)
        at, validation = run.series("val_loss")
        if at:
            axis.plot(at, validation, "D", color=color, markeredgecolor="black", ms=6, label=f"{run.label}, validation")
    axis.legend()


def scale_losses(axis: Any, losses: list[float]) -> bool:
    """A log axis (True) where a few high losses would press all others onto the floor; else one from zero."""
    axis.set_ylabel("loss, nats per target token")
    log = bool(losses) and min(losses) > 0 and max(losses) > 3 * statistics.median(losses)
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("loss, nats per target token (log)")
    else:
        axis.set_ylim(0, 1.05 * max(losses, default=1.0))
    axis.grid(axis="y", color="0.92")
    return log


def smooth(values: list[float], half: int, log: bool = False) -> list[float]:
    """Mean of `half` values on both sides of each and itself; at the ends fewer, the same number on both sides.

    Centred, so that it lags behind nothing: a straight line stays itself, with `log` (the geometric mean) one that is
    straight on a log axis.
    """
    if log:
        return np.exp(smooth(np.log(values).tolist(), half)).tolist()
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(half, np.minimum(places, len(values) - 1 - places))
    return ((sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)).tolist()


def _rates(axis: Any, runs: Sequence[Results]) -> None:
    names = list(dict.fromkeys(key for run in runs for record in run.steps[:1] for key in record if key[:3] == "lr/"))
    for run, style in zip(runs, _cycle(("-", "--", ":", "-.")), strict=False):
        for name, color in zip(names, _cycle(COLORS), strict=False):
            steps, rates = run.series(name)
            axis.plot(steps, rates, style, color=color, linewidth=1.2, label=name[3:] if run is runs[0] else None)
    axis.set_ylabel("learning rate")
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", scilimits=(-2, 2), useMathText=False)
    if names:
        axis.legend(ncol=2)


def accuracy(panels: dict[str, dict[str, dict[str, Accuracy]]], file: Path) -> None:
    """Bars with 95 % intervals by kind of question; a panel per run and split.

    Args:
        panels: By title: by condition (`real`, `shuffled`, `none`, `blind`): accuracy by kind.
        file: The picture.
    """
    rows = [len(conditions["real"]) for conditions in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, sum(0.75 * n + 1.1 for n in rows)),
        height_ratios=rows,
        squeeze=False,
        layout="constrained",
    )
    styles = {**CONTROLS, "blind": ("blind floor", GREY)}
    for axis, (title, conditions) in zip(axes.flat, panels.items(), strict=True):
        kinds = list(conditions["real"])
        known = [name for name in styles if name in conditions]
        height = 0.8 / len(known)
        for number, name in enumerate(known):
            label, color = styles[name]
            values = [(y, conditions[name][kind]) for y, kind in enumerate(kinds) if kind in conditions[name]]
            percents = [v.percent for _, v in values]
            # Not below zero: at 0 and 100 % the ends differ from it by rounding.
            errors = np.maximum([[v.percent - v.low for _, v in values], [v.high - v.percent for _, v in values]], 0)
            places = [y - 0.4 + (number + 0.5) * height for y, _ in values]
            shown = None if name == "blind" else errors
            axis.barh(places, percents, height, xerr=shown, color=color, label=label, error_kw={"lw": 1, "capsize": 2})
        axis.set_yticks(range(len(kinds)), [_wrap(kind, 28) for kind in kinds])
        axis.invert_yaxis()
        axis.set(xlim=(0, 102), xlabel="accuracy, % right (95 % interval)", title=title)
    handles = {label: bar for axis in axes.flat for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, ncol=len(handles), loc="outside upper center")
    save(figure, file)


def confusion(tables: dict[str, tuple[list[str], list[str], list[list[int]]]], file: Path) -> None:
    """What was answered, given what is right; a panel per kind of question.

    Args:
        tables: By title: right answers (rows), given answers (columns), counts.
        file: The picture.
    """
    sizes = [max(3.0, 0.55 * len(columns) + 1.8) for _, columns, _ in tables.values()]
    tallest = max(len(rows) for rows, _, _ in tables.values())
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(sum(sizes), 0.45 * tallest + 2.0),
        squeeze=False,
        width_ratios=sizes,
        layout="constrained",
    )
    for axis, (title, (rows, columns, counts)) in zip(axes.flat, tables.items(), strict=True):
        values = np.array(counts, dtype=float)
        shares = 100 * values / np.maximum(values.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap=_MAP, vmin=0, vmax=100, aspect="equal")
        axis.set_anchor("N")
        for y, x in np.ndindex(*values.shape):
            if values[y, x]:
                axis.text(x, y, f"{int(values[y, x])}", ha="center", va="center", fontsize=8,
                          color="white" if shares[y, x] > 55 else DARK)  # fmt: skip
        axis.set_xticks(range(len(columns)), [_wrap(c, 16) for c in columns], rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), [_wrap(r, 16) for r in rows], fontsize=8)
        axis.set(title=_wrap(title, 40), xlabel="answered", ylabel="right answer")
        axis.spines[:].set_visible(False)
    figure.suptitle("questions by right and given answer; colour: share of the row", fontsize=9)
    save(figure, file)


def deltas(maps: dict[str, dict[str, dict[int, float]]], file: Path) -> None:
    """|dW| / |W| by layer and type, one map per run, on one colour scale.

    Args:
        maps: By title: by type: by layer.
        file: The picture.
    """
    values = [v for types in maps.values() for by_layer in types.values() for v in by_layer.values()]
    positive = [v for v in values if v > 0]
    spread = len(positive) == len(values) and max(positive) > 10 * min(positive)
    norm = LogNorm(min(positive), max(positive)) if spread else Normalize(0, max(values) or 1.0)
    widest = max(len({layer for by in types.values() for layer in by}) for types in maps.values())
    heights = [0.4 * len(types) + 0.9 for types in maps.values()]
    figure, axes = plt.subplots(
        len(maps),
        1,
        figsize=(min(16, max(5.5, 0.62 * widest + 2.5)), sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, types) in zip(axes.flat, maps.items(), strict=True):
        layers = sorted({layer for by_layer in types.values() for layer in by_layer})
        grid = np.array([[by_layer.get(layer, math.nan) for layer in layers] for by_layer in types.values()])
        image = axis.imshow(grid, cmap=_MAP, norm=norm, aspect="auto")
        if len(layers) <= 16:
            for y, x in np.ndindex(*grid.shape):
                if math.isfinite(grid[y, x]):
                    dark = image.norm(grid[y, x]) > 0.55
                    axis.text(x, y, f"{grid[y, x]:.2g}", ha="center", va="center", fontsize=7,
                              color="white" if dark else DARK)  # fmt: skip
        every = max(1, len(layers) // 32)
        axis.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axis.set_yticks(range(len(types)), list(types))
        axis.set(title=title, xlabel="layer of the language model", ylabel="type")
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="|dW| / |W|", shrink=0.9)
    save(figure, file)


def step_time(stages: dict[str, dict[str, float]], file: Path) -> None:
    """Seconds per step split into phases, one bar per run; phases that take no time are left out."""
    phases = [phase for phase in PHASES if any(seconds[phase] > 0 for seconds in stages.values())]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(stages) + 1.4), layout="constrained")
    left = np.zeros(len(stages))
    for phase in phases:
        width = np.array([seconds[phase] for seconds in stages.values()])
        axis.barh(range(len(stages)), width, left=left, color=COLORS[PHASES.index(phase)], label=phase, height=0.6)
        left += width
    axis.set_yticks(range(len(stages)), list(stages))
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step (median, rank 0)")
    axis.set_title("where a step's time goes", loc="left")
    if phases:
        axis.legend(ncol=len(phases), loc="lower right", bbox_to_anchor=(1, 1))
    save(figure, file)


def samples(tiles: list[tuple[str, list[tuple[bytes | None, str, str, str]]]], file: Path) -> None:
    """Questions with what was answered to the right image and, beside it, to a wrong one.

    Args:
        tiles: Question, and one or more of: image file (None: not here), its heading, the answer, the answer's colour.
        file: The picture.
    """
    pair = max(len(shown) for _, shown in tiles)
    across = {1: 5, 2: 3}.get(pair, 2)
    down = -(-len(tiles) // across)
    figure = plt.figure(figsize=(across * (1.75 * pair + 0.3), 2.75 * down), layout="constrained")
    blocks = figure.subfigures(down, across, squeeze=False, wspace=0.04, hspace=0.03)
    for block, (question, shown) in zip(blocks.flat, tiles, strict=False):
        block.suptitle(_wrap(question, 24 * pair), fontsize=9, fontweight="bold")
        for axis, (image, heading, answer, color) in zip(
            block.subplots(1, pair, squeeze=False)[0], shown, strict=False
        ):
            axis.set_box_aspect(1)
            if image is not None:
                axis.imshow(Image.open(io.BytesIO(image)).convert("RGB"), aspect="equal", interpolation="nearest")
                axis.set_facecolor("0.9")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(True)
            axis.spines[:].set_color(color)
            axis.set_title(heading, fontsize=8, color="0.4")
            axis.set_xlabel(_wrap(answer, 24), fontsize=9, color=color)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write a picture and forget it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a sign that the font has not
        figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _cycle(values: Sequence[Any]) -> list[Any]:
    return list(values) * 20


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(textwrap.shorten(text, 3 * width, placeholder=" …"), width)
