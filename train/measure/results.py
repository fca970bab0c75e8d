"""What runs have left behind, read for reports: configuration, facts, metrics and evaluations."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from common.files import DamagedFile, read_json, read_records
from train import config as configuration
from train.config import RunConfig
from train.data import open_split
from train.measure.scoring import Accuracy
from train.measure.tracking import read_metrics
from train.measure.weight_space import WeightSpace
from train.process.run_dir import read_record
from train.process.run_files import RunDir

PHASES = ("data", "vision", "connector", "llm", "backward", "optimizer")
BENCHMARKS = "benchmarks.json"
"""What `train.benchmark` writes among the evaluations."""
_AGAIN = "evaluate the run again"


@dataclass(frozen=True)
class Evaluation:
    """Scores and predictions of one call of `train.evaluate`.

    Attributes:
        file: Its JSON file; the predictions lie beside it.
        split: As it was named: `test`, `val` or a prepared folder.
        data: Folder of the split.
        images: `real`, `shuffled` or `none`.
        merged: Whether every image's weights were folded into the LLM.
        count, available: Questions asked, questions of the split.
        seconds: Of answering.
        accuracy: By kind of question, and `overall`.
        blind: The blind floor, the same kinds; none: the run trained on no questions that are here.
        words: The floor of a reader of the questions' words (`train.measure.text_baseline`); none: as `blind`.
        weights: How the images lie to each other in weight space; none: not measured.
        rarer: Accuracy on the questions that the blind floor gets wrong; empty: as `blind`, or it gets none wrong.
    """

    file: Path
    split: str
    data: str
    images: str
    merged: bool
    count: int
    available: int
    seconds: float
    accuracy: dict[str, Accuracy]
    blind: dict[str, Accuracy] | None
    weights: WeightSpace | None = None
    words: dict[str, Accuracy] | None = None
    rarer: dict[str, Accuracy] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Evaluation:
        """From `RUN/evaluation/NAME.json`.

        Raises:
            DamagedFile: it is not what `train.evaluate` writes.
        """
        found = read_json(file, _AGAIN)
        try:
            accuracy, blind, words, rarer = (
                {kind: Accuracy(**value) for kind, value in found.get(key, {}).items()}
                for key in ("accuracy", "blind_floor", "text_floor", "rarer_answers")
            )
            accuracy["overall"]
            return cls(
                file,
                str(found["split"]),
                str(found.get("data", found["split"])),
                str(found["images"]),
                bool(found.get("merged", "-merged" in file.stem)),
                int(found["count"]),
                int(found["available"]),
                float(found["seconds"]),
                accuracy,
                blind if found.get("training_questions", 1) else None,
                WeightSpace.read(found.get("weights")),
                words if words and found.get("training_questions", 1) else None,
                rarer,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(f"{file} is no result of train.evaluate ({error!r}); {_AGAIN}") from error

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """One record per question: sample, dialogue, question, answer, prediction, type, right, score.

        Raises:
            DamagedFile: the file beside the scores is missing or damaged.
        """
        keys = ("sample", "dialogue", "question", "answer", "prediction", "type", "right")
        return read_records(self.file.with_suffix(".jsonl"), keys, _AGAIN)


@dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
        label: What tells it apart from the other runs of the report.
        path: Its directory.
        config: As it was given.
        record: `run.json`; empty for an imported model.
        facts: `facts.json`; empty before the first step.
        metrics: All records.
        evaluations: By name of their files.
    """

    label: str
    path: Path
    config: RunConfig
    record: dict[str, Any]
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [record for record in self.metrics if "loss" in record]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where it was recorded and is finite."""
        found = [(r["step"], r[key]) for r in self.metrics if isinstance(r.get(key), int | float)]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The last value of one figure."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def score(self, split: str) -> Accuracy | None:
        """Of all kinds together with the right images: of several evaluations of a split, that of most questions."""
        found = [e for e in self.evaluations if (e.split, e.images, e.merged) == (split, "real", False)]
        return max(found, key=lambda e: e.count).accuracy["overall"] if found else None

    def deltas(self) -> tuple[int, dict[str, dict[int, float]]] | None:
        """Step, and |dW| / |W| by type and layer, of the last record that has them."""
        prefix = "delta_ratio/"
        for record in reversed(self.metrics):
            sites = [key.removeprefix(prefix) for key in record if key.startswith(prefix) and "." in key]
            if sites:
                found: dict[str, dict[int, float]] = {}
                for site in sites:
                    layer, _, kind = site.partition(".")
                    found.setdefault(kind, {})[int(layer)] = float(record[prefix + site])
                return record["step"], found
        return None

    def groups(self) -> list[dict[str, Evaluation]]:
        """The evaluations by split, each with its `images` (or `merged`) as key: of several, that of most questions."""
        by_split: dict[str, dict[str, Evaluation]] = {}
        for each in sorted(self.evaluations, key=lambda e: e.count):
            key = "merged" if each.merged and each.images == "real" else each.images
            if key == each.images and each.merged:
                continue
            by_split.setdefault(each.data, {})[key] = each
        return list(by_split.values())

    def images(self, evaluation: Evaluation, wanted: Iterable[str]) -> dict[str, bytes]:
        """First image file of each of the `wanted` samples of the evaluation's split.

        Raises:
            DataError: the split is not on this machine.
        """
        left, found = set(wanted), {}
        path = getattr(self.config.data, evaluation.split, None) if evaluation.split in ("test", "val") else None
        for sample in open_split(self.config.data, path or evaluation.split):
            if sample.id in left and sample.images:
                found[sample.id] = sample.images[0]
                left.discard(sample.id)
            if not left:
                break
        return found


def load(paths: list[Path]) -> list[Results]:
    """The runs of a report.

    Raises:
        ConfigError, DamagedFile: not a run directory, or one of its files is damaged.
    """
    common = common_folder(paths)
    return [_load(path, str(path.relative_to(common))) for path in map(_absolute, paths)]


def common_folder(paths: list[Path]) -> Path:
    """The nearest folder that all runs lie below."""
    return Path(os.path.commonpath([_absolute(path).parent for path in paths]))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _load(path: Path, label: str) -> Results:
    run = RunDir(path)
    record = read_record(path) if run.record.exists() else {}  # an imported model has none
    facts = read_json(run.facts, "start the run again, which writes it anew") if run.facts.exists() else {}
    files = sorted(set(run.evaluation.glob("*.json")) - {run.evaluation / BENCHMARKS})
    evaluations = [Evaluation.read(file) for file in files]
    return Results(label, path, configuration.read(run.config), record, facts, read_metrics(path), evaluations)


def reading(right: Accuracy, controls: dict[str, Accuracy | None]) -> str:
    """What accuracy with the right image says, against what needs no sight.

    A kind is seen where the lower end of the interval of the right image is above every control.

    Args:
        right: Accuracy with the right image.
        controls: By name (`blind floor`, `wrong image`, `no image`); None: not known.
    """
    known = {name: each.percent for name, each in controls.items() if each is not None}
    if not known:
        return "not known: nothing to compare with"
    name, best = max(known.items(), key=lambda item: item[1])
    if right.low > best:
        return f"sees: {right.percent - best:.1f} points above {name}"
    few = f" (only {right.count} questions)" if right.count < 30 else ""
    return f"does not see yet: not above {name}, {best:.1f}{few}"


def stage_figures(run: Path) -> dict[str, Any]:
    """Speed and size of one stage, from its metrics: medians over the steps after the first two (warm-up).

    Raises:
        DamagedFile: there are none, or they are not what was written.
    """
    records = [record for record in read_metrics(run) if "loss" in record]
    if not records:
        raise DamagedFile(f"{RunDir(run).metrics} is missing or holds no step: there is nothing to report of {run}")
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


def run_identity(run: Path) -> dict[str, Any]:
    """Commit and versions of a run."""
    record = read_record(run)
    return {"git_commit": record["git_commit"], "git_dirty": record["git_dirty"], "versions": record["versions"]}
