"""One stage on one rank: puts model, data, engine, checkpoints and tracking together and runs the loop."""

from __future__ import annotations

import gc
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from transformers import PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from common.errors import UserError
from data_prep.store.errors import DataError
from data_prep.store.pixels import ImageInput, PixelPreprocessor
from data_prep.store.split import Split
from model.config import VisionConfig
from model.connectors import FeatureNorm
from model.generator.weights import base_norms
from model.loading import fingerprint, load_tokenizer, part_fingerprints
from model.ops import set_backend, set_merge
from model.vision import VisionEncoder, build_vision
from model.vlm import VisionLanguageModel, build_model
from train.config import DTYPES, RunConfig, accumulation
from train.data import (
    EvalLoader,
    TrainLoader,
    ensure_feature_cache,
    load_preprocessor,
    make_text,
    open_split,
    open_train_split,
)
from train.data.unknown import unknown_targets
from train.engine.checkpoint import Progress
from train.engine.divergence import RisingLoss
from train.engine.engine import Engine, deepspeed_config, freeze
from train.engine.export import export, exported_part, load_connector
from train.engine.finite import bad_weights
from train.engine.loop import Loop, Observer, Stage, progress_bar, return_memory
from train.engine.records import Recorder
from train.engine.validation import Validation, write_facts
from train.measure import memory
from train.measure.flops import FlopCounter
from train.measure.stragglers import Stragglers
from train.measure.summary import describe, parameter_counts
from train.measure.tracking import Tracker
from train.process import distributed
from train.process.run_dir import machine, read_record
from train.process.run_files import RunDir
from train.process.signals import StopRequest


@dataclass
class _Data:
    """What a stage reads, opened before the model is built, so that what is wrong with it is not found later.

    Attributes:
        tokenizer: The LLM's.
        image: What image files become: pixels or cached features.
        vision: An encoder without weights whose features are cached; its sizes are still needed.
        loader: The training micro-batches of this rank.
        questions: Prompts of the sample table.
        held_out: Rows of the validation loss.
        identity: Fingerprints of data and models.
    """

    tokenizer: PreTrainedTokenizerBase
    image: ImageInput
    vision: VisionEncoder | None
    loader: TrainLoader
    questions: EvalLoader | None
    held_out: EvalLoader | None
    identity: dict[str, str]


def run_stage(config: RunConfig, run_dir: Path, device: torch.device, stop: StopRequest) -> bool:
    """Run (or resume) the stage of a run directory. Collective.

    Returns:
        True when the stage is finished and exported, False when it stopped on request with a checkpoint.

    Raises:
        ValueError, UserError: anything the user can put right.
    """
    if RunDir(run_dir).done.exists():
        return True
    micro_steps = accumulation(config, distributed.world_size())
    _seed(config)
    backend = set_backend(config.ops.backend, device)
    set_merge(config.ops.merge, device)  # not used in training: a choice that cannot run is refused now
    data = _open_data(config, run_dir, micro_steps, device)
    total_steps = config.stage.steps or max(1, data.loader.batching.steps(config.stage.epochs or 0))

    config = _settle_checkpointing(config, micro_steps, data.tokenizer, device)
    model = _build(config, micro_steps, data)
    norms = base_norms(model.llm, model.placement, lambda w: GatheredParameters([w])) if model.placement else {}
    freeze(model, config.stage)  # after the norms: adapters are no part of W
    flops = FlopCounter(model, features_cached=config.vision.cache)
    recorder = Recorder(config, total_steps, flops, norms, Stragglers(device))
    table, counts = describe(model), parameter_counts(model)
    engine = Engine(model, config, total_steps, micro_steps)
    if model.connector.norm is not None and not model.connector.norm.measured:
        _measure_features(engine, model.connector.norm, data.loader, data.image)

    stage = Stage(config, run_dir, engine, data.loader, data.identity, total_steps, Progress(), stop)
    found = stage.resume()
    stop.begin()
    facts: dict[str, Any] = {
        "world_size": distributed.world_size(),
        "zero_stage": engine.zero_stage,
        "total_steps": total_steps,
        "accumulation": micro_steps,
        "ops_backend": backend,
        "gradient_checkpointing": config.engine.gradient_checkpointing,
        "vision_features_cached": config.vision.cache,
        "parameters": counts,
        "identity": data.identity,
        "machine": machine(),
    }
    tracker = None
    if distributed.rank() == 0:
        print(table)
        print(
            f"{config.stage.name}: {total_steps} steps of {config.data.batch_size} samples, "
            f"world size {distributed.world_size()}, ZeRO stage {engine.zero_stage}, {config.engine.precision}, "
            f"{micro_steps} micro-steps, ops backend {backend} (asked for {config.ops.backend})"
            + (f", resumed at step {stage.progress.step} from {found}" if found else ""),
            flush=True,
        )
        write_facts(run_dir, facts, stage.progress)
        tracker = Tracker(config, run_dir, read_record(run_dir), stage.progress.step, facts)
    validation = None
    if data.questions and data.held_out:
        validation = Validation(config, run_dir, engine, data.questions, data.held_out, tracker, facts)
    return _train(stage, recorder, data, tracker, validation)


def _train(
    stage: Stage, recorder: Recorder, data: _Data, tracker: Tracker | None, validation: Validation | None
) -> bool:
    """Run the loop and, at its end, export what the stage has trained. Collective."""
    config, engine = stage.config, stage.engine
    summary: dict[str, Any] = {}
    try:
        with progress_bar(stage) as bar:
            observers: list[Observer] = [] if tracker is None else [tracker.log]
            observers += [bar, RisingLoss(config.tracking.max_loss_rise)]
            observers += [return_memory] if engine.device.type == "cpu" else []
            finished = Loop(stage, recorder, observers, validation).run()
        summary |= asdict(stage.progress)
        if finished:
            if validation is not None:
                summary["val_loss"] = validation.loss
            if config.checkpoint.export == "best":
                stage.take_best()
            export(engine, stage.run_dir, data.tokenizer, config, data.identity)
    finally:
        if tracker is not None:
            tracker.finish(summary)
    return finished


def _open_data(config: RunConfig, run_dir: Path, micro_steps: int, device: torch.device) -> _Data:
    rank, world = distributed.rank(), distributed.world_size()
    tokenizer = load_tokenizer(config.llm.path)
    _check_answers(config, tokenizer, warn=rank == 0)
    identity = part_fingerprints(config.model)
    pixels = load_preprocessor(config.vision)
    image: ImageInput = pixels
    vision = None
    if config.vision.cache:
        vision = build_vision(_vision(config), torch.float32)
        image = _feature_cache(config, vision, pixels, device, read_record(run_dir)["id"])
        vision.encoder = None  # its sizes are still needed, its weights are not
        gc.collect()
    image_tokens = memory.image_tokens(config)
    loader = TrainLoader(config.data, tokenizer, image, config.seed, rank, world, micro_steps, image_tokens)
    loader.check_shared_memory(distributed.local_world_size())
    identity["data"] = loader.fingerprint
    questions = held_out = None
    if config.data.val:
        questions = _validation(config, config.data.val, tokenizer, image, prompts=True)
        held_out = _validation(config, config.data.val, tokenizer, image, prompts=False)
    return _Data(tokenizer, image, vision, loader, questions, held_out, identity)


def _seed(config: RunConfig) -> None:
    """The same on every rank: parameters are made everywhere and rank 0's win."""
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    if config.engine.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        # It would fill all memory that is asked for, whether or not it is written next.
        torch.utils.deterministic.fill_uninitialized_memory = False


def _settle_checkpointing(
    config: RunConfig, micro_steps: int, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> RunConfig:
    """`engine.gradient_checkpointing=auto` becomes true or false, the same on all ranks. Collective."""
    if config.engine.gradient_checkpointing != "auto":
        return config
    world = distributed.world_size()
    load = memory.workload(config, tokenizer, config.data.batch_size // world // micro_steps)
    own = memory.available(config, device, distributed.local_world_size())
    assert own is not None  # the device is known
    plan = memory.plan(config, world, load)
    limit = int(distributed.reduce([own], device, "min")[0]) - (plan.host if device.type == "cpu" else 0)
    if distributed.rank() == 0:
        print(memory.describe(config, world, load, plan, limit), flush=True)
    chosen = replace(config.engine, gradient_checkpointing=plan.needs_checkpointing(limit))
    return replace(config, engine=chosen)


def _vision(config: RunConfig) -> VisionConfig:
    """The encoder this stage starts from: the one before may have trained it."""
    return replace(config.vision, path=str(exported_part(config, "vision") or config.vision.path))


def _build(config: RunConfig, micro_steps: int, data: _Data) -> VisionLanguageModel:
    """The model, its pretrained parts partitioned while they are read (ZeRO-3): no rank ever holds all of them.

    Starts from the export of `init_from`.
    """
    llm_path = str(exported_part(config, "llm") or config.llm.path)
    # transformers asks this object (by weak reference) whether to partition while loading.
    keep = HfDeepSpeedConfig(deepspeed_config(config, distributed.world_size(), micro_steps))
    parts = replace(config.model, vision=_vision(config))
    model = build_model(parts, DTYPES[config.engine.precision], llm_path=llm_path, vision=data.vision)
    del keep
    if config.init_from is not None:
        load_connector(model.connector, Path(config.init_from), config.model, data.identity)
    return model


def _feature_cache(
    config: RunConfig, vision: VisionEncoder, pixels: PixelPreprocessor, device: torch.device, run: str
) -> ImageInput:
    splits = [open_train_split(config.data, source.path) for source in config.data.train]
    splits += [open_split(config.data, config.data.val)] if config.data.val else []
    vision.requires_grad_(False)
    vision.to(device).eval()

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return vision(batch.to(device)).cpu()

    read = config.vision
    return ensure_feature_cache(
        Path(config.cache_dir) / "features",
        splits,
        pixels,
        encode,
        f"{fingerprint(_vision(config).path)}/{read.layer}/{read.final_norm}/{read.keep_cls}",
        dtype="float32" if config.engine.precision == "fp32" else "bfloat16",
        run=run,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        barrier=distributed.barrier,
    )


def _measure_features(
    engine: Engine, norm: FeatureNorm, loader: TrainLoader, image: ImageInput, images: int = 1024
) -> None:
    """Fill the connector's `norm` with mean and deviation over training images. Collective.

    Takes samples spread evenly over those of all sources that have images; every rank encodes the same number of them.
    """
    rank, world = distributed.rank(), distributed.world_size()
    chosen = _spread(loader.splits, images)
    if not chosen:
        folders = ", ".join(str(split.folder) for split in loader.splits)
        raise UserError(f"{folders}: no sample with an image, which the connector needs to learn from")
    total = torch.zeros(2, len(norm.mean), dtype=torch.float64)
    seen = 0
    for index in range(rank, -(-len(chosen) // world) * world, world):
        # A rank with none left, or with one of a shard that is left out, still runs the encoder: ZeRO-3 needs every
        # rank in step.
        source, position = chosen[min(index, len(chosen) - 1)]
        split, files = loader.splits[source], loader.images(source, position) if index < len(chosen) else []
        try:
            views = image(files[0]) if files else image.dummy()
        except ValueError as error:  # ImageError, DataError
            raise UserError(f"{split.shard_of(position)}: sample {split[position].id}: {error}") from error
        with torch.no_grad():
            features = engine.model.encode(views.to(engine.device))
        if not features.isfinite().all():
            why = bad_weights(engine.model) or f"those of {split.shard_of(position)}: sample {split[position].id} are"
            raise UserError(f"the vision encoder's features are not finite: {why}")
        if files:
            flat = features.double().flatten(0, 1).cpu()
            total += torch.stack([flat.sum(0), flat.square().sum(0)])
            seen += len(flat)
    *sums, vectors = distributed.reduce([*total.flatten().tolist(), float(seen)], engine.device)
    if not vectors:
        raise UserError("all shards that hold images are corrupt and left out (data.on_corrupt_shard=drop)")
    mean, square = (torch.tensor(sums, dtype=torch.float64) / vectors).view(2, -1)
    norm.set(mean.float(), (square - mean.square()).clamp_min(0).sqrt().float())


def _spread(splits: list[Split], number: int) -> list[tuple[int, int]]:
    """(source, position) of at most `number` samples with images, spread evenly over all that there are."""
    having = [np.flatnonzero(split.index()["images"]) for split in splits]
    ends = np.cumsum([len(positions) for positions in having])
    count = min(number, int(ends[-1]))
    places = np.arange(count) * int(ends[-1]) // max(1, count)
    sources = np.searchsorted(ends, places, side="right")
    return [
        (source, int(having[source][place - ends[source]]))
        for source, place in zip(sources.tolist(), places.tolist(), strict=True)
    ]


def _check_answers(config: RunConfig, tokenizer: PreTrainedTokenizerBase, warn: bool) -> None:
    """Raise a `DataError` where the tokenizer cannot spell the answers to learn; `data.on_unknown=warn` prints it."""
    text = make_text(config.data, tokenizer)
    for source in config.data.train:
        message = unknown_targets(open_train_split(config.data, source.path), text)
        if message and config.data.on_unknown == "fail":
            raise DataError(f"{message}; take an LLM that can spell them, or set data.on_unknown=warn")
        if message and warn:
            print(f"warning: {message}", file=sys.stderr, flush=True)


def _validation(
    config: RunConfig, split: str, tokenizer: PreTrainedTokenizerBase, image: ImageInput, prompts: bool
) -> EvalLoader:
    """Prompts for the sample table (the same on all ranks) or rows for the validation loss (shared among ranks)."""
    rank, world = (0, 1) if prompts else (distributed.rank(), distributed.world_size())
    return EvalLoader(
        open_split(config.data, split),
        make_text(config.data, tokenizer),
        image,
        prompts=prompts,
        rows=config.tracking.num_samples if prompts else config.evaluation.batch_size,
        limit=config.tracking.num_samples if prompts else config.evaluation.val_dialogues,
        seed=config.seed,
        rank=rank,
        world_size=world,
    )
