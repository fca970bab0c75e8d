"""The result tables of the VLoRA paper (arXiv 2405.20339, NeurIPS 2024), as printed.

Read from the paper's own tables. Table 6's averages are the true means of its rows: the paper prints 28.0 and 25.8. The
rows of Table 1 that are other models' are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GENERAL = ("MMBench", "MME", "ScienceQA", "HallusionBench", "MMMU", "CCBench")
FINE = ("TextVQA", "DocVQA", "InfoVQA", "OCRBench", "average")
VLORA = (63.4, 1311.3, 66.4, 26.4, 33.7, 28.6)
LLAVA = (64.3, 1510.7, 66.8, 27.6, 35.7, 27.5)


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        number: In the paper.
        title: What it compares.
        benchmarks: Names of the columns.
        rows: Name of a row, its scores, and what tells a run of it: values of configuration keys.
        command: What makes the runs at full size, and on this machine.
    """

    number: int
    title: str
    benchmarks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...], dict[str, Any]], ...]
    command: str


def _sweep(number: int, title: str, key: str, experiment: str, rows: dict[Any, tuple[float, ...]]) -> Table:
    point = {"connector.name": "vlora"}
    found = tuple((str(value), scores, point | {key: value}) for value, scores in rows.items())
    command = (
        f"python -m train experiment={experiment} hydra/launcher=slurm hydra.launcher.finetune=true; "
        f"mini: python -m train experiment={experiment} scale=mini hydra.launcher.finetune=true seed=0,1,2"
    )
    return Table(number, title, GENERAL, found, command)


def _connector(name: str, data: str | None = None) -> dict[str, Any]:
    return {"connector.name": name} | ({} if data is None else {"pretraining data": data})


_SYSTEMS = (
    ("LLaVA-v1.5, LLaVA-Pretrain", LLAVA, _connector("mlp", "llava_pretrain")),
    ("LLaVA-v1.5, CapsFusion", (64.6, 1470.0, 67.7, 27.4, 33.8, 25.3), _connector("mlp", "capsfusion")),
    ("LLaVA with a Q-Former, CapsFusion", (60.7, 1241.5, 67.3, 26.7, 33.8, 25.3), _connector("qformer")),
    ("VLoRA, CapsFusion", VLORA, _connector("vlora")),
    ("cross-attention (ours, not in the paper)", (), _connector("crossattn")),
)
TABLES = (
    Table(
        2,
        "how the image reaches the language model",
        GENERAL,
        _SYSTEMS,
        "python -m train experiment=vlora_7b | llava_v15_7b | llava_v15_7b_capsfusion | llava_qformer_7b; "
        "mini: python -m train.demo --connectors vlora mlp",
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
            ("LLaVA-v1.5", (58.2, 18.4, 20.4, 31.8, 32.2), _connector("mlp")),
            ("VLoRA", (51.4, 13.4, 19.5, 27.7, 28.0), _connector("vlora")),
        ),
        "as Table 2",
    ),
    Table(
        7,
        "training speed",
        ("samples/s, stage 1", "samples/s, stage 2"),
        (("LLaVA", (106, 46), _connector("mlp")), ("VLoRA", (246, 73), _connector("vlora"))),
        "python -m benchmarks.vlora_vs_llava",
    ),
)
