"""`python -m train.evaluate run=RUN_DIR [key=value ...]`: answers, accuracy, blind floor.

    python -m train.evaluate run=outputs/RUN
    python -m train.evaluate run=outputs/RUN images=shuffled     # every question with another sample's image
    srun ... python -m train.evaluate run=outputs/RUN            # questions shared among ranks

Greedy decoding with a KV cache in batches, from a run's exported weights in a plain process (generating inside the
ZeRO-3 engine is twenty times slower). Writes RUN_DIR/evaluation/SPLIT-IMAGES.json and .jsonl (every prediction);
results of more questions are never replaced by those of fewer, which get their number behind the name. The accuracy
goes to the run's wandb page too, unless it has tracking=disabled. `python -m train.report run=RUN_DIR` shows all of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import run_cli
from common.files import DamagedFile, read_json, write_atomically, write_json
from common.settings import setting
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from model.batch import Batch
from model.deploy.merging import MergeReport, merged
from model.generation import AnswerFormat, answers
from model.loading import load_tokenizer, part_fingerprints
from model.ops import NO_SAMPLE, set_backend, set_merge
from model.vlm import VisionLanguageModel, build_model
from train import config as configuration
from train.config import DTYPES, ConfigError, MovedTo, RunConfig
from train.data import EvalBatch, EvalLoader, load_preprocessor, make_text, open_split, open_train_split
from train.engine.export import load_connector, trained_part
from train.measure import card, scoring, tracking, weight_space
from train.measure.scoring import Question
from train.measure.text_baseline import text_predictions
from train.process import distributed
from train.process.run_files import RunDir


@dataclass
class Options:
    """Keys of the command line; null: as in the run's own `evaluation` group.

    Attributes:
        run: Run directory with an export.
        split: `test` or `val` of the run's data, or a prepared folder below its `data.root`.
        images: `real`, `shuffled` (every sample shown another one's images) or `none`.
        max_samples: A fixed random subset of the questions; null: the run's setting.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer.
        seed: Of the subset and of the shuffle.
        merge: Fold every image's weights into the language model, which then answers as a plain LLM; prints what
            rounding loses on the first image. For many questions about one image.
        llm, vision: `llm.path=...`, `vision.path=...`: where the run's base models are now, if they have moved.
    """

    run: str = setting("???", path=True)
    split: str = "test"
    images: str = setting("real", choices=("real", "shuffled", "none"))
    max_samples: int | None = setting(None, within="[1, 1e9]")
    batch_size: int | None = setting(None, within="[1, 1e6]")
    max_new_tokens: int | None = setting(None, within="[1, 1e6]")
    seed: int = setting(0, within="[0, 4294967295]")
    merge: bool = False
    llm: MovedTo = field(default_factory=MovedTo)
    vision: MovedTo = field(default_factory=MovedTo)


def load_model(config: RunConfig, run: Path, device: torch.device) -> VisionLanguageModel:
    """A run's model from its export, in evaluation mode, in the run's precision.

    Raises:
        ValueError, UserError: no export, or base models other than the run's.
    """
    if device.type == "cuda":  # a run of a GPU may be looked at on a CPU, where `auto` is the only sense
        set_backend(config.ops.backend, device)
        set_merge(config.ops.merge, device)
    identity = part_fingerprints(config.model)
    llm, vision = trained_part(run, "llm"), trained_part(run, "vision")
    own = replace(config.model, vision=replace(config.vision, path=str(vision or config.vision.path)))
    model = build_model(own, DTYPES[config.engine.precision], llm_path=None if llm is None else str(llm))
    load_connector(model.connector, run, config.model, identity)
    return model.to(device).eval()


def answer(
    model: VisionLanguageModel,
    loader: EvalLoader,
    max_new_tokens: int,
    device: torch.device,
    merge: bool = False,
    first: list[EvalBatch] | None = None,
) -> list[dict[str, Any]]:
    """One record per question of this rank: sample, dialogue, question, answer, prediction.

    `first` gets the batches that `weight_space.measure` needs, so that their images are read once.
    """
    records: list[dict[str, Any]] = []
    kept: set[str] = set()
    for evaluation in tqdm(loader, desc="evaluate", unit="batch", disable=distributed.rank() > 0, mininterval=10):
        if not evaluation.items:
            continue
        if first is not None and len(kept) < weight_space.MOST:
            first.append(evaluation)
            kept.update(item.sample for item in evaluation.items if item.shown)
        batch = evaluation.batch.to(device, next(model.parameters()).dtype)
        if merge:
            texts, report = merged_answers(model, batch, evaluation.encoders, max_new_tokens)
            if report is not None and not records and distributed.rank() == 0:
                print(report)
        else:
            texts = answers(model, batch, evaluation.encoders, max_new_tokens)
        for item, text in zip(evaluation.items, texts, strict=True):
            records.append({**asdict(item), "prediction": text})
    return records


def merged_answers(
    model: VisionLanguageModel, batch: Batch, formats: Sequence[AnswerFormat], max_new_tokens: int
) -> tuple[list[str], MergeReport | None]:
    """As `answers`, one image set after the other, its weights folded into the language model; and the last loss."""
    with torch.no_grad():
        weights = model.condition(batch).weights
    assert weights is not None and batch.rows is not None
    texts, last = [""] * len(batch.input_ids), None
    for sample in sorted(set(batch.rows.sample)):
        rows = [number for number, owner in enumerate(batch.rows.sample) if owner == sample]
        alone = batch.text_only(rows)
        with nullcontext() if sample == NO_SAMPLE else merged(model.llm, weights, sample) as report:
            found = answers(model, alone, [formats[row] for row in rows], max_new_tokens)
        last = report or last
        for row, text in zip(rows, found, strict=True):
            texts[row] = text
    return texts, last


def training_questions(config: RunConfig) -> list[Question]:
    """All questions with answers that the run's stage trained on; captions are none."""
    found = []
    for source in config.data.train:
        for sample in open_train_split(config.data, source.path):
            for number, dialogue in enumerate(sample.conversations):
                user, reply = dialogue[-2]["content"], dialogue[-1]["content"]
                if user:
                    reference = sample.references[number] if sample.references else None
                    found.append(Question.of(sample.id, user, reply, reference))
    return found


def main() -> int:
    """Evaluate one run."""
    options: Options = configuration.parse_options(Options, sys.argv[1:], __doc__)
    run = Path(options.run)
    config = configuration.load(RunDir(run).config, options.llm, options.vision)
    limit = options.max_samples or config.evaluation.max_samples
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        device = distributed.init(config.engine.timeout_minutes)
    else:
        distributed.quiet()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank, world = distributed.rank(), distributed.world_size()

    tokenizer = load_tokenizer(config.llm.path)
    split = _open(config, options.split)
    pixels = load_preprocessor(config.vision)
    loader = EvalLoader(
        split,
        make_text(config.data, tokenizer),
        pixels,
        rows=options.batch_size or config.evaluation.batch_size,
        limit=limit,
        images={"real": "own"}.get(options.images, options.images),
        seed=options.seed,
        rank=rank,
        world_size=world,
    )
    model = load_model(config, run, device)
    if options.merge and model.placement is None:
        raise ConfigError(f"merge=true: {run} has connector={config.connector.name}, which makes no weights")
    longest = options.max_new_tokens or config.evaluation.max_new_tokens
    first: list[EvalBatch] | None = (
        [] if options.images == "real" and model.placement is not None and rank == 0 else None
    )
    started = time.perf_counter()
    records = answer(model, loader, longest, device, options.merge, first)
    seconds = time.perf_counter() - started
    space = None if first is None else weight_space.measure(model, first, device)
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, records)
        records = [record for part in gathered for record in part]
        distributed.shutdown()
    if rank == 0:
        _write(run, options, config, split, records, seconds, space)
    return 0


def _write(
    run: Path,
    options: Options,
    config: RunConfig,
    split: Split,
    records: list[dict[str, Any]],
    seconds: float,
    space: weight_space.WeightSpace | None = None,
) -> None:
    records.sort(key=lambda r: (r["sample"], r["dialogue"]))
    questions = [Question.of(r["sample"], r["question"], r["answer"], r.pop("reference")) for r in records]
    predictions = [r["prediction"] for r in records]
    for record, question, kind in zip(records, questions, scoring.kinds(questions), strict=True):
        points = scoring.score(question, record["prediction"])
        record |= {"type": kind, "right": points > 0.5, "score": points}
        if question.answers:
            record["answers"] = question.answers
    result = scoring.accuracy(questions, predictions)
    try:
        training = training_questions(config)
        why = f"{run} trained on captions only: no blind floor, and questions are new to the model"
    except DataError as error:  # away from the data it was trained on, or imported
        training, why = [], f"no blind floor: {error}"
    if not training:
        print(why, file=sys.stderr)
    blind = scoring.blind_predictions(questions, training) if training else [""] * len(questions)
    floor = scoring.accuracy(questions, blind)
    rarer = scoring.accuracy(questions, predictions, blind) if training else {}
    text = text_predictions(questions, training) if training else [""] * len(questions)
    text_floor = scoring.accuracy(questions, text)
    folder = RunDir(run).evaluation
    folder.mkdir(exist_ok=True)
    name = f"{options.split.replace('/', '-')}-{options.images}{'-merged' if options.merge else ''}"
    name = _free_name(folder, name, len(records))
    write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "images": options.images,
        "merged": options.merge,
        "split": options.split,
        "data": str(split.folder),
        "count": len(records),
        "available": int(split.index()["dialogues"].sum()),
        "seconds": seconds,
        "questions_per_s": len(records) / seconds,
        "accuracy": scoring.as_dict(result),
        "blind_floor": scoring.as_dict(floor),
        "text_floor": scoring.as_dict(text_floor),
        "rarer_answers": scoring.as_dict(rarer),
        "training_questions": len(training),
        "weights": None if space is None else space.as_dict(),
    }
    write_json(folder / f"{name}.json", summary)
    if (RunDir(run).export / "config.json").is_file():
        card.write(run, RunDir(run).export)
    asked = f"{len(records)} of {summary['available']} questions of {split.folder}"
    print(f"{run}: {asked} ({options.split}), images: {options.images}")
    width = max(10, *(len(key) + 2 for key in result))
    print(
        f"{'type':<{width}}{'count':>7}{'right %':>9}{'95 % interval':>18}{'blind %':>9}{'words %':>9}{'rarer %':>16}"
    )
    for key, value in result.items():
        interval, unusual = f"{value.low:.1f} - {value.high:.1f}", rarer.get(key)
        floors = f"{floor[key].percent:>9.1f}{text_floor[key].percent:>9.1f}"
        few = f"{unusual.percent:.1f} of {unusual.count}" if unusual else ""
        print(f"{key:<{width}}{value.count:>7}{value.percent:>9.1f}{interval:>18}{floors}{few:>16}")
    if rarer:
        print("rarer: right among the questions whose answer is not the usual one to their text (the blind one)")
    print(f"predictions: {folder / name}.jsonl")
    tracking.log_evaluation(config, run, name, summary)


def _free_name(folder: Path, name: str, count: int) -> str:
    """`name`, or with the number of questions where results of more questions have that name: they are kept."""
    try:
        earlier = int(read_json(folder / f"{name}.json", "")["count"])
    except (DamagedFile, KeyError, TypeError, ValueError):
        earlier = 0
    return f"{name}-{count}" if earlier > count else name


def _open(config: RunConfig, split: str) -> Split:
    path = getattr(config.data, split) if split in ("test", "val") else split
    if path is None:
        raise ConfigError(f"the run's data.{split} is null; name a prepared folder with split=...")
    return open_split(config.data, path)


if __name__ == "__main__":
    run_cli(main)
