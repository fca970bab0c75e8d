"""Finished small runs as one line each: what `train.tables` keeps of a run when its directory is gone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.files import read_records, write_atomically
from model.config import parse_types
from train import config as configuration
from train.config import RunConfig
from train.measure import results
from train.process.run_files import RunDir


@dataclass(frozen=True)
class Trial:
    """One run over both stages.

    Attributes:
        connector, seed: As configured.
        types, rank, blocks: Of the generator; empty and 0 for another connector.
        llm, data, pixels: Name of the LLM's folder, the split that scores, side of an image.
        samples: Images of stage 1 and of stage 2; of stage 2 alone where the directory of stage 1 is gone.
        questions: Dialogues of an image in stage 2; None: all.
        rates: `optim.lr` of the same stages.
        seconds: Training time of the same stages.
        val_loss: The last of stage 2; None: not measured.
        percent, low, high, count: Right answers on the split, their 95 % interval, questions; None and 0: not scored.
        machine, commit: Where it ran; `+`: with changes that were not committed.
    """

    connector: str
    seed: int
    types: str
    rank: int
    blocks: int
    llm: str
    data: str
    pixels: int | None
    samples: list[int]
    questions: int | None
    rates: list[dict[str, float]]
    seconds: float
    val_loss: float | None
    percent: float | None
    low: float | None
    high: float | None
    count: int
    machine: str
    commit: str

    @property
    def setting(self) -> str:
        """What two trials must share to be compared, but for how long they train."""
        return f"{self.llm}, {self.data}, {self.pixels} px"

    @property
    def point(self) -> str:
        """The same for a run and its repetition."""
        measured = ("seconds", "val_loss", "percent", "low", "high", "count", "machine", "commit")
        return json.dumps({name: value for name, value in asdict(self).items() if name not in measured})


def of_run(run: Path, split: str) -> Trial:
    """What stage 2 in `run`, and the stage 1 that it started from, have left.

    Raises:
        ConfigError, DamagedFile: one of their files is damaged.
    """
    found = results.load([run])[0]
    config = found.config
    stages = [(run, config)]
    if config.init_from and RunDir(before := Path(config.init_from)).done.exists():
        stages.insert(0, (before, configuration.read(RunDir(before).config)))
    trained = [_training(path, stage) for path, stage in stages]
    score = found.score(split)
    generator = config.generator if config.connector.name == "vlora" else None
    record = found.record
    return Trial(
        connector=config.connector.name,
        seed=config.seed,
        types=",".join(parse_types(generator.types)) if generator else "",
        rank=generator.rank if generator else 0,
        blocks=generator.num_blocks if generator else 0,
        llm=Path(config.llm.path).name,
        data=str(getattr(config.data, split)),
        pixels=config.vision.image_size,
        samples=[samples for samples, _ in trained],
        questions=config.data.dialogues_per_sample,
        rates=[_rates(stage) for _, stage in stages],
        seconds=round(sum(seconds for _, seconds in trained), 1),
        val_loss=found.last("val_loss"),
        percent=score.percent if score else None,
        low=score.low if score else None,
        high=score.high if score else None,
        count=score.count if score else 0,
        machine=str(found.facts.get("machine", "")),
        commit=(record.get("git_commit") or "")[:7] + ("+" if record.get("git_dirty") else ""),
    )


def _training(run: Path, config: RunConfig) -> tuple[int, float]:
    """Images of a stage, and the seconds of its steps from their median speed: a pause does not count."""
    figures = results.stage_figures(run)
    samples = figures["steps"] * config.data.batch_size
    return samples, samples / figures["samples_per_s"]


def _rates(config: RunConfig) -> dict[str, float]:
    return {name: rate for name, rate in asdict(config.optim.lr).items() if rate is not None}


def read(file: Path) -> list[Trial]:
    """The trials of a file, in its order.

    Raises:
        DamagedFile: a line is no trial.
    """
    names = [each.name for each in fields(Trial)]
    return [Trial(**{name: record[name] for name in names}) for record in read_records(file, names, "restore it")]


def merge(kept: list[Trial], found: list[Trial]) -> list[Trial]:
    """Both, a repetition in place of what it repeats; one with a score is not replaced by one without."""
    points = {trial.point: trial for trial in kept}
    for trial in found:
        old = points.get(trial.point)
        if old is None or trial.percent is not None or old.percent is None:
            points[trial.point] = trial
    return list(points.values())


def write(file: Path, trials: list[Trial]) -> None:
    """One line per trial."""
    write_atomically(file, "".join(json.dumps(asdict(trial)) + "\n" for trial in trials))
