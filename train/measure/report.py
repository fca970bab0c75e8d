"""The report of one or more runs: `report.md` and its pictures, from what the runs wrote and nothing else."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.markdown import as_table, plain
from data_prep.store.errors import DataError
from data_prep.store.manifest import read_manifest
from train.measure import card, plots
from train.measure.results import Evaluation, Results, reading
from train.measure.scoring import Accuracy, followed, normalise

MOST_ANSWERS = 12
"""A kind of question with at most so many right answers gets a picture of what was answered instead."""
_MOST_TABLES, _MOST_TILES, _MOST_MISTAKES, _MOST_NEAREST, _NEIGHBOURS = 4, 12, 15, 6, 3
_NAMES = {
    "shuffled": "wrong image",
    "none": "no image",
    "blind": "blind floor",
    "words": "words alone",
    "merged": "right image, merged",
}


def write(out: Path, runs: Sequence[Results], title: str, further: Sequence[str] = ()) -> Path:
    """Write the report; what cannot be shown is named at its end, with the command that would make it.

    Args:
        out: Folder for `report.md` and the pictures.
        runs: What it is about.
        title: Its heading.
        further: Lines of sections that stand before the commands to reproduce.

    Returns:
        The report's file.

    Raises:
        DamagedFile: the predictions of an evaluation.
    """
    for *_, group in _groups(runs):
        for each in group.values():
            _ = each.predictions  # a damaged file is told before anything is written
    out.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    lines = [f"# {plain(title)}", ""]
    for section in (_results, _training, _weights, _neighbours, _answers):
        lines += section(out, runs, missing)
    lines += [*further, *_reproduce(runs)]
    if missing:
        lines += ["## Not in this report", "", *(f"- {line}" for line in missing), ""]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _groups(runs: Sequence[Results]) -> list[tuple[Results, str, dict[str, Evaluation]]]:
    """Run, title and evaluations of each split that was evaluated with the right images."""
    found = []
    for run in runs:
        for group in run.groups():
            if "real" in group:
                name = f"{run.label}, {group['real'].split}" if len(runs) > 1 else group["real"].split
                found.append((run, name, group))
    return found


def _results(out: Path, runs: Sequence[Results], missing: list[str]) -> list[str]:
    """Accuracy by kind of question and split: table, picture, and what it means."""
    groups = _groups(runs)
    if not groups:
        last = runs[-1].path
        missing.append(f"Accuracy: `{_evaluate(last)}`, and again with `images=shuffled` and `images=none`.")
        return []
    lines, panels = ["## What it sees", ""], {}
    for run, title, group in groups:
        real = group["real"]
        conditions = {name: each.accuracy for name, each in group.items()}
        if real.blind is not None:
            conditions["blind"] = real.blind
        if real.words is not None:
            conditions["words"] = real.words
        lines += [f"**{plain(title)}**: {_asked(real)}", ""]
        lines += _accuracy_table(conditions, followed(real.predictions), real.rarer)
        panels[f"{title} ({real.count} questions)"] = conditions
        for name in ("shuffled", "none"):
            if name not in group:
                what = f"Accuracy of {plain(title)} with {_NAMES[name].replace('wrong', 'a wrong')}"
                missing.append(f"{what}: `{_evaluate(run.path, real.split, name)}`.")
        if real.blind is None:
            missing.append(f"The blind floor of {plain(title)}: the run trained on no questions, or its data are away.")
    plots.accuracy(panels, out / "accuracy.png")
    lines += [
        "Percent right, with 95 % Wilson intervals. The blind floor is the most frequent answer in training",
        "to the question's text; \"words alone\": naive Bayes over the question's words.",
        "Rarer answers: the questions whose right answer is not the most frequent one to their text.",
        "A kind of question is seen where the right image's interval lies above every control. Answers follow the",
        "image where two images with different answers to the same question both get theirs: 0 without looking.",
        "",
        "![accuracy](accuracy.png)",
        "",
    ]
    return lines


def _asked(evaluation: Evaluation) -> str:
    part = " (a fixed random subset)" if evaluation.count < evaluation.available else ""
    return f"{evaluation.count:,} of {evaluation.available:,} questions{part} of `{plain(evaluation.data)}`."


def _accuracy_table(
    conditions: dict[str, dict[str, Accuracy]], pairs: dict[str, float], rarer: dict[str, Accuracy]
) -> list[str]:
    real = conditions["real"]
    columns = [name for name in ("merged", "shuffled", "none", "blind", "words") if name in conditions]
    head = ["kind", "questions", "right image", *(_NAMES[name] for name in columns)]
    head += ["rarer answers", "follows the image", "reading"]
    table: list[list[object]] = [[*head]]
    for kind, right in real.items():
        cells = [_percent(conditions[name].get(kind), name not in ("blind", "words")) for name in columns]
        controls = {_NAMES[name]: conditions[name].get(kind) for name in columns if name != "merged"}
        said = reading(right, controls)
        follows = f"{pairs[kind]:.1f}" if kind in pairs else ""
        unusual = f"{_percent(rarer[kind], False)} of {rarer[kind].count}" if kind in rarer else ""
        table.append([plain(kind), right.count, _percent(right), *cells, unusual, follows, said])
    return [as_table(table), ""]


def _percent(value: Accuracy | None, interval: bool = True) -> str:
    if value is None:
        return ""
    return f"{value.percent:.1f} ({value.low:.1f}–{value.high:.1f})" if interval else f"{value.percent:.1f}"


def _training(out: Path, runs: Sequence[Results], missing: list[str]) -> list[str]:
    """What was trained on what, and how it went."""
    columns = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    table = [["", *(plain(run.label) for run in runs)]]
    table += [[name, *(plain(column.get(name, "")) for column in columns)] for name in names]
    lines = ["## What was trained", "", as_table(table)]
    seconds = sum(float(run.steps[-1]["seconds"]) for run in runs if run.steps)
    asked = sum(each.seconds for run in runs for each in run.evaluations)
    times = f"All steps of training took {_duration(seconds)}, all evaluations {_duration(asked)}"
    lines += ["", f"{times}; loading models, data and features comes on top.", ""]
    for run in runs:
        if run.config.init_from and not any(str(other.path) == run.config.init_from for other in runs):
            missing.append(
                f"The stage that {plain(run.label)} began from: `python -m train.report "
                f"run={shlex.quote(f'{run.config.init_from},{run.path}')}`."
            )
        if run.config.data.val is None or not run.series("val_loss")[0]:
            missing.append(f"Validation loss of {plain(run.label)}: train with `data.val=NAME/SPLIT`, to the end.")
    if trained := [run for run in runs if run.steps]:
        plots.training(trained, out / "losses.png")
        lines += ["![losses](losses.png)", ""]
    else:
        missing.append("Loss curves: no step was made yet (`metrics.jsonl` holds none).")
    return lines


def _facts(run: Results) -> dict[str, str]:
    """Rows of the table of one run, by name."""
    config, facts = run.config, run.facts
    rows = {name: value for name, value in card.training(config, run.record, facts) if name != "code"}
    parameters = facts.get("parameters", {})
    parts = ", ".join(f"{k} {v:,}" for k, v in parameters.items() if k not in ("total", "trained"))
    rows["parameters"] = f"{parameters.get('trained', 0):,} trained of {parameters.get('total', 0):,} ({parts})"
    rows |= {"language model": config.llm.path, "encoder": config.vision.path, "connector": config.connector.name}
    data = config.data
    rows["data"] = ", ".join(_size(data.root, source.path) for source in data.train)
    for role in ("val", "test"):
        if getattr(data, role):
            rows[f"{role} data"] = _size(data.root, getattr(data, role))
    if run.steps:
        last, speed = run.steps[-1], sorted(record["samples_per_s"] for record in run.steps)
        rows["made"] = f"{last['step']} steps, {last['samples']:,} samples, {_duration(last['seconds'])}"
        rows["speed"] = f"{speed[len(speed) // 2]:.1f} samples/s (median)"
        rows["loss, mean of the last 10 steps"] = (
            f"{sum(r['loss'] for r in run.steps[-10:]) / len(run.steps[-10:]):.4f}"
        )
    differs = "generated weights (A): share that differs from image to image"
    for name, key in (("validation loss", "val_loss"), (differs, "image_share")):
        if (value := run.last(key)) is not None:
            rows[name] = f"{value:.4f}"
    ranks = f"{facts.get('world_size', '?')} ranks"
    rows["machine"] = f"{facts['machine']}; {ranks}" if "machine" in facts else ranks
    rows["versions"] = rows.pop("versions")
    dirty = " with uncommitted changes (git.diff)" if run.record.get("git_dirty") else ""
    rows["commit"] = f"{run.record.get('git_commit') or 'not known'}{dirty}"
    return rows


def _size(root: str, path: str) -> str:
    try:
        manifest = read_manifest(Path(root) / path)
    except DataError:
        return f"{path} (not on this machine)"
    sizes = f"{manifest.samples:,} samples, {manifest.dialogues:,} dialogues"
    return f"{path} ({sizes}, fingerprint {manifest.fingerprint[:12]})"


def _weights(out: Path, runs: Sequence[Results], missing: list[str]) -> list[str]:
    """Where the image changes the language model most."""
    maps = {}
    for run in runs:
        if found := run.deltas():
            maps[f"{run.label}, step {found[0]}"] = found[1]
        elif run.config.connector.name == "vlora" and run.steps:
            missing.append(f"|dW| / |W| of {plain(run.label)}: not recorded; train with `tracking.weights_every=N`.")
    if not maps:
        return []
    plots.deltas(maps, out / "deltas.png")
    return [
        "## Where the image goes",
        "",
        "Size of the weights made from an image against the language model's own, mean over the images of a batch.",
        "",
        "![|dW| / |W| by layer and type](deltas.png)",
        "",
    ]


def _neighbours(out: Path, runs: Sequence[Results], missing: list[str]) -> list[str]:
    """In how many directions the images' weights vary, and which images get almost the same."""
    found = [
        (run, title, group["real"], space) for run, title, group in _groups(runs) if (space := group["real"].weights)
    ]
    if not found:
        return []
    lines = ["## Images in weight space", ""]
    table: list[list[object]] = [["", "images", "effective rank", "energy that all share"]]
    for _, title, _, space in found:
        table.append([plain(title), len(space.samples), f"{space.effective_rank:.1f}", f"{space.shared:.0%}"])
    lines += [
        as_table(table),
        "",
        "Effective rank: in how many directions the weights of these images differ, at most one less than images.",
    ]
    run, _, each, space = found[-1]
    nearest = space.nearest(_NEIGHBOURS)
    chosen = range(0, len(nearest), max(1, len(nearest) // _MOST_NEAREST))[:_MOST_NEAREST]
    try:
        pictures = run.images(each, space.samples)
    except DataError as error:
        missing.append(f"Nearest images in weight space: {plain(error)}")
        return [*lines, ""]
    tiles = []
    for number in chosen:
        shown = [(pictures.get(space.samples[number]), "image", "", plots.DARK)]
        for rank, (other, cosine) in enumerate(nearest[number], 1):
            shown.append((pictures.get(space.samples[other]), f"nearest {rank}", f"{cosine:.2f}", plots.DARK))
        tiles.append((space.samples[number], shown))
    plots.samples(tiles, out / "nearest.png")
    lines += ["Nearest: cosine of what sets the weights of two images apart from the mean.", ""]
    return [*lines, "![nearest images in weight space](nearest.png)", ""]


def _answers(out: Path, runs: Sequence[Results], missing: list[str]) -> list[str]:
    """Confusions, mistakes, and questions with right and wrong image side by side; of the last evaluated split."""
    groups = _groups(runs)
    if not groups:
        return []
    run, title, group = groups[-1]
    predictions = group["real"].predictions
    lines = ["## Answers", "", f"Of {plain(title)}, with the right image.", ""]
    if tables := _confusions(predictions):
        plots.confusion(tables, out / "confusion.png")
        lines += ["![confusion](confusion.png)", ""]
    lines += _mistakes(predictions)
    try:
        if tiles := _tiles(run, group):
            plots.samples(tiles, out / "samples.png")
            lines += ["![samples](samples.png)", ""]
    except DataError as error:
        missing.append(f"Pictures of samples: {plain(error)}")
    return lines


def _confusions(predictions: list[dict[str, Any]]) -> dict[str, tuple[list[str], list[str], list[list[int]]]]:
    """Right answers, given answers and counts, by kind, for the kinds with few right answers."""
    tables = {}
    for kind in sorted({p["type"] for p in predictions}):
        pairs = Counter((normalise(p["answer"]), normalise(p["prediction"])) for p in predictions if p["type"] == kind)
        rows = sorted({answer for answer, _ in pairs})
        if not 2 <= len(rows) <= MOST_ANSWERS:
            continue
        counts = [[pairs[row, column] for column in rows] for row in rows]
        others = [sum(n for (answer, said), n in pairs.items() if answer == row and said not in rows) for row in rows]
        columns = list(rows)
        if any(others):
            columns.append("(other)")
            counts = [[*line, other] for line, other in zip(counts, others, strict=True)]
        tables[kind] = (rows, columns, counts)
    largest = sorted(tables, key=lambda kind: -sum(map(sum, tables[kind][2])))[:_MOST_TABLES]
    return {kind: tables[kind] for kind in tables if kind in largest}


def _mistakes(predictions: list[dict[str, Any]]) -> list[str]:
    """The most frequent wrong answers to a question, with the share of these questions that got it."""
    asked = Counter((p["question"], p["answer"]) for p in predictions)
    wrong = Counter((p["question"], p["answer"], p["prediction"]) for p in predictions if not p["right"])
    if not wrong:
        return ["No mistake.", ""]
    example = {(p["question"], p["answer"], p["prediction"]): p["sample"] for p in reversed(predictions)}
    worst = sorted(wrong.items(), key=lambda item: (-item[1], -item[1] / asked[item[0][:2]], item[0]))
    lines = [f"The worst mistakes, of {sum(wrong.values()):,} in {len(predictions):,} answers:", ""]
    table = [["question", "right answer", "answered", "times", "an example"]]
    for key, times in worst[:_MOST_MISTAKES]:
        question, answer, said = key
        of = f"{times} of {asked[question, answer]}"
        table.append([plain(question), plain(answer), plain(said) or "(nothing)", of, plain(example[key])])
    return [*lines, as_table(table), ""]


def _tiles(run: Results, group: dict[str, Evaluation]) -> list[tuple[str, list[tuple[bytes | None, str, str, str]]]]:
    """Questions of all kinds, half of them mistakes where there are some, for `plots.samples`."""
    wrong = {(p["sample"], p["dialogue"]): p for p in group["shuffled"].predictions} if "shuffled" in group else {}
    predictions = group["real"].predictions
    pictured = [p for p in predictions if p.get("shown", p["sample"])]  # a text has no picture
    paired = [p for p in pictured if wrong.get((p["sample"], p["dialogue"]), {}).get("shown")]
    chosen = varied(paired or pictured, _MOST_TILES)
    shown = {p["sample"] for p in chosen}
    shown |= {wrong[p["sample"], p["dialogue"]]["shown"] for p in chosen} if paired else set()
    images = run.images(group["real"], shown)
    tiles = []
    for item in chosen:
        right = f"{item['prediction']}" if item["right"] else f"{item['prediction']} (is: {item['answer']})"
        color = plots.GOOD if item["right"] else plots.BAD
        pictures = [(images.get(item["sample"]), "right image", right, color)]
        if paired:
            other = wrong[item["sample"], item["dialogue"]]
            pictures.append((images.get(other["shown"]), "wrong image", other["prediction"], plots.DARK))
        tiles.append((item["question"], pictures))
    return tiles


def varied(predictions: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` predictions of distinct samples: of every kind in turn, a right and a wrong answer by turns."""
    queues: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for item in predictions:
        queues.setdefault((not item["right"], item["type"]), []).append(item)
    chosen: list[dict[str, Any]] = []
    seen: set[str] = set()
    order = sorted(queues, key=lambda key: (key[1], key[0]))
    while len(chosen) < count and any(queues.values()):
        for key in order:
            queues[key] = [item for item in queues[key] if item["sample"] not in seen]
            if queues[key] and len(chosen) < count:
                chosen.append(queues[key].pop(0))
                seen.add(chosen[-1]["sample"])
    return chosen


def _reproduce(runs: Sequence[Results]) -> list[str]:
    """The commands that made the runs."""
    lines = ["## Made by", "", "```"]
    commits = list(dict.fromkeys(str(run.record.get("git_commit")) for run in runs))
    lines += [f"git checkout {commit}" for commit in commits if commit != "None"]
    for run in runs:
        words = [str(word) for word in run.record.get("command", [])]
        if words:
            lines.append(f"python -m {_module(words[0])} {shlex.join(words[1:])}".rstrip())
        for each in run.evaluations:
            limit = f" max_samples={each.count}" if each.count < each.available else ""
            lines.append(_evaluate(run.path, each.split, each.images) + " merge=true" * each.merged + limit)
    return [*lines, "```", ""]


def _module(program: str) -> str:
    """The module behind `sys.argv[0]`: `/code/train/__main__.py` is `train`."""
    path = Path(program)
    return path.parent.name if path.name == "__main__.py" else program


def _evaluate(run: Path, split: str = "test", images: str = "real") -> str:
    words = [f"run={run}", *([f"split={split}"] if split != "test" else [])]
    return shlex.join(["python", "-m", "train.evaluate", *words, *([f"images={images}"] if images != "real" else [])])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"
