"""The model card of a run's export: facts from the run's own records, nothing else."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from common.files import read_json, write_atomically
from common.markdown import as_table, plain
from train import config as configuration
from train.config import RunConfig
from train.process.run_files import RunDir

_FRONT = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vlora]
---
"""
_USE = """## Use

```python
import vlora
model, processor = vlora.load("{name}")
talk = vlora.Conversation(model, processor, ["picture.png"])
print(talk.ask("{question}"))
```

With transformers' own classes: `AutoModelForImageTextToText.from_pretrained`, `AutoProcessor.from_pretrained` and
`pipeline("image-text-to-text")` read this folder after `import vlora`. It answers in the manner of the data it was
trained on, and knows no other.
"""


def write(run_dir: Path, folder: Path) -> None:
    """Write `folder`/README.md from what the run directory records; again after an evaluation, which adds scores."""
    config = configuration.load(RunDir(run_dir).config)
    record, facts = _read(RunDir(run_dir).record), _read(RunDir(run_dir).facts)
    described = _read(folder / "config.json")
    lines = [_FRONT, f"# {plain(run_dir.name)}", "", _what(config), ""]
    lines += [as_table([("", ""), *((key, plain(value)) for key, value in training(config, record, facts))])]
    lines += ["", "## Parts", ""]
    table = [["part", "from", "fingerprint", "weights", "licence"]]
    for name, part in described.get("parts", {}).items():
        base = part.get("base") or part
        where = "trained here, in this folder" if part.get("base") else "not changed, not in this folder"
        source = Path(base["path"]).name if Path(base["path"]).is_absolute() else base["path"]
        table.append([name, plain(source), base["fingerprint"], where, plain(licence(base["path"]))])
    lines += [as_table(table), "", *_scores(run_dir), _USE.format(name=folder, question=_question(run_dir))]
    write_atomically(folder / "README.md", "\n".join(lines))


def licence(path: str) -> str:
    """What a model's folder says about its licence: its card's `license`, else the first line of a licence file."""
    folder = Path(path).expanduser()
    card = folder / "README.md"
    if card.is_file() and (front := re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)):
        fields = yaml.safe_load(front.group(1))
        if isinstance(fields, dict) and fields.get("license"):
            return str(fields["license"])
    for file in sorted(folder.glob("LICEN[CS]E*")):
        return next(
            (line.strip() for line in file.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()),
            file.name,
        )
    return "not stated where it was taken from" if folder.is_dir() else f"see {path}"


def _what(config: RunConfig) -> str:
    how = {
        "vlora": "The image reaches the language model through its weights: low-rank deltas made from the image; "
        "no visual token stands in its input",
    }.get(config.connector.name, f"The image reaches the language model as visual tokens ({config.connector.name})")
    return f"{how}. Written by a run of VLoRA's training pipeline; every figure below comes from that run's records."


def training(config: RunConfig, record: dict[str, Any], facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what a run was: stage, steps, rates, precision, data, seed, code, versions."""
    rates = ", ".join(f"{part} {rate:g}" for part, rate in asdict(config.optim.lr).items() if rate is not None)
    trained = ", ".join(part for part in ("connector", "llm", "vision") if getattr(config.stage.train, part))
    if config.stage.train.llm == "lora":
        trained = trained.replace("llm", f"llm through adapters of rank {config.stage.lora.rank}")
    rows = [
        ("stage", f"{config.stage.name}, trained: {trained}"),
        ("started from", str(config.init_from or "the pretrained parts")),
        ("steps", f"{facts.get('total_steps', config.stage.steps)}, of {config.data.batch_size} samples each"),
        ("learning rates", f"{rates}; {config.optim.schedule}"),
        ("precision", f"{config.engine.precision}, ZeRO stage {config.engine.zero_stage}"),
        ("parameters", f"{facts.get('parameters', {}).get('total', 0):,}"),
        ("data", ", ".join(f"{source.path}" for source in config.data.train)),
        ("data fingerprint", str(facts.get("identity", {}).get("data", "unknown"))),
        ("text template", config.data.template),
        ("seed", str(config.seed)),
        ("code", f"{record.get('git_commit')}{' with uncommitted changes' if record.get('git_dirty') else ''}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())),
    ]
    best = facts.get("best") if config.checkpoint.export == "best" else None
    if best:
        rows.insert(3, ("weights", f"of step {best['step']}, the lowest validation loss ({best['val_loss']:.4f})"))
    if config.connector.name == "vlora":
        generator = config.generator
        every = "every layer" if generator.every == 1 else f"every {generator.every} layers"
        high = f" above {generator.above:.0%} of the depth" if generator.above else ""
        placed = f"layers {generator.layers}" if generator.layers is not None else every + high
        rows.insert(1, ("deltas", f"rank {generator.rank}, types {generator.types}, {placed}"))
    return rows


def _scores(run_dir: Path) -> list[str]:
    files = sorted(RunDir(run_dir).evaluation.glob("*.json"))
    if not files:
        return ["## Scores", "", "Not evaluated yet.", ""]
    lines = [
        "## Scores",
        "",
        "Percent right (95 % interval); blind: the best answer from the question's text alone.",
        "",
    ]
    table = [["questions", "images", "count", "overall", "blind"]]
    for file in files:
        found = _read(file)
        if "accuracy" not in found or "overall" not in found["accuracy"]:
            continue
        score, blind = found["accuracy"]["overall"], found.get("blind_floor", {}).get("overall", {})
        interval = f"{score['percent']:.1f} ({score['low']:.1f}-{score['high']:.1f})"
        floor = f"{blind['percent']:.1f}" if blind else ""
        table.append([found["split"], found["images"], found["count"], interval, floor])
    return [*lines, as_table(table), ""]


def _question(run_dir: Path) -> str:
    for file in sorted(RunDir(run_dir).evaluation.glob("*.jsonl")) + sorted(RunDir(run_dir).samples.glob("*.jsonl")):
        with suppress(OSError, ValueError, AttributeError):  # an example only: a damaged file has none
            first = json.loads(file.read_text(encoding="utf-8").partition("\n")[0] or "{}")
            if first.get("question"):
                return " ".join(str(first["question"]).split()).translate({ord('"'): "'", ord("`"): "'"})
    return "what does the image show?"


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, "remove it, or start the run again") if file.is_file() else {}
