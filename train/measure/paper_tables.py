"""The result tables of the VLoRA paper (arXiv 2405.20339, NeurIPS 2024), as printed.

Read from the paper's own tables. Table 6's averages are the true means of its rows: the paper prints 28.0 and 25.8. The
rows of Table 1 that are other models' are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GENERAL = ("MMBench", "MME", "ScienceQA", "HallusionBench", "MMMU", "CCBench")
FINE = ("TextVQA", "DocVQA", "InfoVQA", "OCRBench", "average")
_MINI = "llm=tiny hydra.launcher.finetune=true data.dialogues_per_sample=1 launch.workers=1 seed=0,1,2"
VLORA = (63.4, 1311.3, 66.4, 26.4, 33.7, 28.6)
LLAVA = (64.3, 1510.7, 66.8, 27.6, 35.7, 27.5)


PRETRAINING = "pretraining data"
"""Among what a row wants: a part of the path of a source that stage 1 read."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: As printed.
        scores: Of the benchmarks; empty: not in the paper.
        wanted: What tells a run of it: values of configuration keys, and `PRETRAINING`.
        mini: Whether a small run can fill it; these all read the same data.
    """

    name: str
    scores: tuple[float, ...]
    wanted: dict[str, Any]
    mini: bool = True


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        number: In the paper.
        title: What it compares.
        benchmarks: Names of the columns.
        rows: In the paper's order.
        command: What makes the runs at full size, and on this machine.
    """

    number: int
    title: str
    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]
    command: str


def _sweep(number: int, title: str, key: str, experiment: str, rows: dict[Any, tuple[float, ...]]) -> Table:
    point = {"connector.name": "vlora"}
    found = tuple(Row(str(value), scores, point | {key: value}) for value, scores in rows.items())
    command = (
        f"python -m train experiment={experiment} hydra/launcher=slurm hydra.launcher.finetune=true; "
        f"mini: python -m train experiment={experiment} scale=mini {_MINI}"
    )
    return Table(number, title, GENERAL, found, command)


def _of(connector: str, data: str | None = None) -> dict[str, Any]:
    return {"connector.name": connector} | ({} if data is None else {PRETRAINING: data})


_SYSTEMS = (
    Row("LLaVA-v1.5, LLaVA-Pretrain", LLAVA, _of("mlp", "llava_pretrain")),
    Row("LLaVA-v1.5, CapsFusion", (64.6, 1470.0, 67.7, 27.4, 33.8, 25.3), _of("mlp", "capsfusion"), mini=False),
    Row("LLaVA with a Q-Former, CapsFusion", (60.7, 1241.5, 67.3, 26.7, 33.8, 25.3), _of("qformer")),
    Row("VLoRA, CapsFusion", VLORA, _of("vlora")),
    Row("cross-attention (ours, not in the paper)", (), _of("crossattn")),
)
TABLES = (
    Table(
        2,
        "how the image reaches the language model",
        GENERAL,
        _SYSTEMS,
        "python -m train experiment=vlora_7b | llava_v15_7b | llava_v15_7b_capsfusion | llava_qformer_7b; "
        f"mini: python -m train -m connector=vlora,mlp,qformer,crossattn {_MINI}",
    ),
    _sweep(
        3,
        "weight types",
        "generator.types",
        "ablation_types",
        {
            "qkvom": VLORA,
            "qkvm": (59.6, 1227.5, 64.6, 23.4, 33.2, 24.9),
            "qkv": (59.4, 1267.9, 65.8, 23.2, 33.9, 28.8),
            "qko": (57.2, 1240.5, 64.0, 23.4, 34.6, 24.9),
            "qk": (53.3, 1169.8, 65.0, 23.5, 32.0, 21.8),
        },
    ),
    _sweep(
        4,
        "rank",
        "generator.rank",
        "ablation_rank",
        {
            16: (59.4, 1212.7, 67.1, 22.9, 33.7, 24.5),
            32: (60.7, 1235.6, 67.2, 23.5, 33.2, 25.3),
            64: VLORA,
            128: (61.0, 1228.4, 68.0, 23.8, 33.4, 26.7),
        },
    ),
    _sweep(
        5,
        "blocks of the generator",
        "generator.num_blocks",
        "ablation_blocks",
        {
            4: (60.7, 1289.3, 63.9, 24.4, 32.0, 26.7),
            8: VLORA,
            12: (61.3, 1289.3, 67.1, 25.5, 33.8, 30.2),
        },
    ),
    Table(
        6,
        "text in images",
        FINE,
        (
            Row("LLaVA-v1.5", (58.2, 18.4, 20.4, 31.8, 32.2), _of("mlp", "llava_pretrain"), mini=False),
            Row("VLoRA", (51.4, 13.4, 19.5, 27.7, 28.0), _of("vlora"), mini=False),
        ),
        "as Table 2",
    ),
    Table(
        7,
        "training speed",
        ("samples/s, stage 1", "samples/s, stage 2"),
        (
            Row("LLaVA", (106, 46), _of("mlp", "llava_pretrain"), mini=False),
            Row("VLoRA", (246, 73), _of("vlora"), mini=False),
        ),
        "python -m benchmarks.vlora_vs_llava; mini: docs/paper.md",
    ),
)
