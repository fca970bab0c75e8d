"""The benchmarks of `conf/benchmark`, one file each, and the suites they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from common.errors import ConfigError
from common.options import load_yaml, typed
from common.places import CONF
from common.settings import setting

IMAGES = ("own", "shuffled", "none")
"""With which image a question is asked: its own, that of another question, or none."""


@dataclass
class Benchmark:
    """One benchmark, as lmms-eval runs it and as its result is read.

    Attributes:
        title: Its name in tables.
        suite: `paper`: the ten of the paper's Tables 1 and 6; `seeing`: those that tell more about seeing.
        task: File of lmms-eval's task, below its folder `tasks`.
        split: Split of its data that is asked.
        prompt: What the task puts around a question, its `lmms_eval_specific_kwargs.default`.
        metric: Its metrics; of several, the score is the mean.
        scale: What makes the metric a score as tables print it: 100 for a share.
        max_tokens: Longest answer.
        judge: Whose judgement the original asks and which local rule stands for it; null: none is asked.
        functions: Metrics that a local rule gives, `FILE.FUNCTION` of `train/harness/inside`.
        note: What a reader of the score should know.
        overrides: Further keys of the task, `dataset_path` for one.
    """

    title: str = setting()
    suite: str = setting(choices=("paper", "seeing"))
    task: str = setting()
    split: str = setting()
    metric: list[str] = setting()
    max_tokens: int = setting(within="[1, 100000]")
    prompt: dict[str, Any] = field(default_factory=dict)
    scale: float = setting(1.0, within="(0, 1e6]")
    judge: str | None = None
    functions: dict[str, str] = field(default_factory=dict)
    note: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def load(name: str) -> Benchmark:
    """The benchmark of `conf/benchmark/NAME.yaml`.

    Raises:
        ConfigError: there is none of that name, or its file is wrong.
    """
    file = CONF / "benchmark" / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{name}: no such benchmark; there are {', '.join(names())}")
    try:
        tree: Any = OmegaConf.to_container(load_yaml(file.read_text(encoding="utf-8")))
        found: Benchmark = typed(Benchmark, tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return found


def names() -> list[str]:
    """All benchmarks."""
    return sorted(file.stem for file in (CONF / "benchmark").glob("*.yaml"))


def suite(name: str) -> tuple[dict[str, Benchmark], tuple[str, ...]]:
    """The benchmarks of a suite, and the images it shows.

    Args:
        name: `paper`: the ten, each question with its own image. `seeing`: POPE, GQA and VQAv2, each with its own
            image, a wrong one and none. `all`: all of them in all three ways.
    """
    every = {each: load(each) for each in names()}
    chosen = {each: one for each, one in every.items() if name in ("all", one.suite)}
    return chosen, IMAGES[:1] if name == "paper" else IMAGES
