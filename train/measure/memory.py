"""Memory of a rank, estimated before anything is loaded: what ZeRO leaves on it, and the activations of a micro-batch.

Activations are not a formula: the model's forward runs once on fake tensors (shapes only, any size, about a second) and
what autograd saves is counted, so that any decoder, connector, placement and attention is right. The rest follows from
DeepSpeed 0.19.8's buffers. What the allocator loses to fragmentation is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedTokenizerBase
from transformers.integrations import moe

from data_prep.store.errors import CorruptShardError
from model.batch import Batch
from model.connectors import connector_class
from model.decoder import loss
from model.decoder.packing import Packing
from model.generator.placement import decoder_layers
from model.vision import build_vision
from model.vlm import VisionLanguageModel, build_model
from train.config import DTYPES, RunConfig
from train.data import is_prepared, make_text, most_views, open_train_split
from train.data.collate import encode_sample
from train.engine.engine import freeze

USABLE = 0.9
"""Share of a device's memory that `engine.gradient_checkpointing=auto` plans with: the rest is for fragmentation, the
CUDA context and communication libraries."""
_ROWS_READ = 256


@dataclass(frozen=True)
class Workload:
    """The largest micro-batch of one rank.

    Attributes:
        samples: Samples with one set of weights each.
        images: Images of all samples; a tile is one.
        rows: Text rows.
        length: Tokens of the longest row.
        mean_length: Tokens of a row on average; what packing needs.
        measured: Whether the lengths come from the data, or are the most the configuration allows.
    """

    samples: int
    images: int
    rows: int
    length: int
    mean_length: float
    measured: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per rank.

    Attributes:
        weights: Parameters as they lie between steps: shards, and those kept whole.
        gradients: Of the trained parameters, as accumulated over micro-batches.
        optimizer: fp32 master weights and Adam's two moments.
        buffers: Gathered parameters, reduction buckets, the largest gradient on its way into one.
        update: Further memory of the optimizer's step, when no activations are alive.
        activations: Of one micro-batch, everything saved for the backward pass.
        checkpointed: The same when the decoder layers are recomputed.
        host: Of the optimizer and the gradients, in host memory (`engine.offload_optimizer`).
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    activations: int
    checkpointed: int
    host: int = 0

    def total(self, checkpointing: bool) -> int:
        """At the peak of a step."""
        active = self.checkpointed if checkpointing else self.activations
        return self.weights + self.gradients + self.optimizer + max(self.buffers + active, self.update)

    def needs_checkpointing(self, available: int) -> bool:
        """Whether a step does not fit into `USABLE` of `available` bytes without recomputation."""
        return self.total(False) > USABLE * available


def available(config: RunConfig, device: torch.device | None = None, local_world: int = 1) -> int | None:
    """Memory that one rank has, bytes: `engine.memory_gib`, the GPU's, or its share of the host's.

    None: planning for a machine that is not this one and no `engine.memory_gib`.
    """
    if config.engine.memory_gib is not None:
        return int(config.engine.memory_gib * 2**30)
    if device is None:
        return None
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [psutil.virtual_memory().total]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text(encoding="utf-8").strip() if Path(name).is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits) // local_world


def image_tokens(config: RunConfig) -> int:
    """Visual tokens that an image adds to every row of its sample, at most."""
    patches = build_vision(config.vision, torch.float32, meta=True).num_patches
    return most_views(config.vision) * connector_class(config.model).tokens_per_image(config.model, patches)


def workload(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None, samples: int) -> Workload:
    """The largest micro-batch of `samples` samples, or of as many average ones as `data.tokens_per_micro_batch` has
    room for: lengths of samples spread evenly over every source.

    Without a tokenizer, or where a source is not on this machine: `data.expected_length`, or else the longest row that
    `data.max_length` allows.

    Raises:
        ValueError: what is wrong with the data, or with how they are turned into text.
    """
    lengths: list[int] = []
    sizes: list[float] = []
    rows, images = 1, 1
    most, visual = config.data.dialogues_per_sample, image_tokens(config)
    sources = [source.path for source in config.data.train]
    if tokenizer is not None and all(is_prepared(config.data, path) for path in sources):
        text = make_text(config.data, tokenizer)
        for path in sources:
            split = open_train_split(config.data, path)
            count = min(_ROWS_READ, len(split))
            for number in range(count):
                try:
                    sample = split[number * len(split) // count]
                except CorruptShardError:
                    if split.whole:
                        raise
                    continue
                chosen = list(range(len(sample.conversations)))
                piece, _ = encode_sample(text, sample, chosen, f"{path}: sample {sample.id}")
                found = [len(row.input_ids) for row in piece.rows]
                lengths += found
                drawn = min(len(found), most or len(found))
                sizes.append(drawn * (sum(found) / max(1, len(found)) + len(sample.images) * visual))
                rows, images = max(rows, len(chosen)), max(images, len(sample.images))
    rows = min(rows, most or rows) if lengths else most or 1
    longest = max(lengths, default=config.data.expected_length or config.data.max_length or 2048)
    mean = sum(lengths) / len(lengths) if lengths else longest
    if (budget := config.data.tokens_per_micro_batch) is not None:
        average = sum(sizes) / len(sizes) if lengths else rows * (longest + images * visual)
        samples = min(samples, math.ceil(budget / average))
    views = images * most_views(config.vision)
    return Workload(samples, samples * views, samples * rows, longest, mean, bool(lengths))


class UnknownMemory(ValueError):
    """A model whose activations depend on more than shapes."""


def plan(config: RunConfig, world_size: int, load: Workload) -> MemoryPlan:
    """The memory plan of a stage. Builds the model's shapes only; reads no weights.

    Args:
        world_size: Ranks that ZeRO partitions over.
        load: The largest micro-batch.

    Raises:
        UnknownMemory: the decoder's forward pass cannot be followed by its shapes.
    """
    dtype = DTYPES[config.engine.precision]
    encoder = build_vision(config.vision, dtype, meta=True)
    cached = config.vision.cache  # features come from disk
    model = build_model(config.model, dtype, meta=True, vision=encoder if cached else None)
    freeze(model, config.stage)
    side = encoder.image_size
    features = (encoder.num_patches, encoder.feature_width) if cached else (3, side, side)
    saved = _Saved(model, dtype)
    try:
        saved.trace(load, features)
    except DataDependentOutputException as error:
        raise UnknownMemory(
            f"what {type(model.llm).__name__} keeps for its backward pass cannot be planned, as it depends on values: "
            "set engine.gradient_checkpointing to true or false"
        ) from error
    return replace(states(model, config, world_size), activations=saved.all(), checkpointed=saved.checkpointed())


def states(model: nn.Module, config: RunConfig, world_size: int) -> MemoryPlan:
    """The part of the plan that does not depend on the micro-batch; its activations are 0."""
    engine = config.engine
    stage, size = engine.zero_stage, DTYPES[engine.precision].itemsize
    numels = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in numels), sum(n for n, needs in numels if needs)
    whole = sum(n for n, _ in numels if n < engine.persistence_threshold)
    largest = max(n for n, needs in numels if needs)
    shard = world_size if stage >= 1 else 1
    if stage == 3:
        weights = (total / world_size + whole) * size
        # DeepSpeed keeps gathered parameters that are needed again soon, up to max_live_parameters.
        gathered = (min(engine.max_live_parameters, total - whole) + engine.prefetch_bucket_size) * size
        gathered = min(gathered, (total - whole) * size)
    else:
        weights, gathered = total * size, 0
    gradients = trained * 4 / (world_size if stage >= 2 else 1)
    # fp32 runs have a master copy of their own too, except without ZeRO.
    optimizer = trained / shard * (8 + 4 * (stage > 0 or size < 4))
    bucket = min(engine.reduce_bucket_size, trained) * size * (1 + engine.overlap_comm)
    update = 4 * min(engine.sub_group_size, trained / shard) if stage == 3 else 4 * trained / shard
    host = 0.0
    if engine.offload_optimizer:  # there the gradients are once more, as the optimizer reads them
        host, gradients, optimizer, update = gradients + optimizer + 4 * trained / shard, 0, 0, 0
    whole_gradients = 0 if stage >= 2 else trained * size * (size < 4)
    buffers = gathered + bucket + largest * size + whole_gradients
    return MemoryPlan(int(weights), int(gradients), int(optimizer), int(buffers), int(update), 0, 0, int(host))


def _any_precision() -> AbstractContextManager[Any]:
    """Experts multiplied by transformers' fallback: torch knows the shapes of its own kernel in bf16 only."""
    return mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False)


class _Saved:
    """Bytes that autograd keeps, per decoder layer and outside of them, each storage once."""

    def __init__(self, model: VisionLanguageModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.layers: dict[int, int] = {}
        self.outside = self.inputs = self.transient = 0
        self._layer: int | None = None
        self._seen: dict[int, object] = {}

    def all(self) -> int:
        """Without recomputation."""
        return self.outside + sum(self.layers.values()) + self.transient

    def checkpointed(self) -> int:
        """Layer inputs, and one layer recomputed at a time."""
        return self.outside + self.inputs + max(self.layers.values(), default=0) + self.transient

    def trace(self, load: Workload, image_shape: tuple[int, ...]) -> None:
        """Run the forward pass of one micro-batch on fake tensors."""
        model = self.model
        # What the model reads on the host is real: ids, masks, which image belongs to which sample.
        length, packing = load.length, None
        if model.pack_tokens:
            length = max(1, round(load.mean_length))
        batch = _batch(load, length)
        if model.pack_tokens:
            visual = model.connector.visual_tokens * load.images // load.samples
            packing = Packing.of(torch.ones(load.rows, visual + length), model.pack_tokens)
        with _any_precision(), FakeTensorMode(allow_non_fake_inputs=True):
            made: dict[int, Tensor] = {}
            # Parameters without memory, in the engine's dtype; a tied one stays one.
            model._apply(lambda t: made.setdefault(id(t), torch.empty(t.shape, dtype=self._dtype_of(t))))
            model.train()
            model.connector.eval()  # a norm over images asks for values; it saves the same in evaluation
            for tensor in (*model.parameters(), *model.buffers()):
                self._count(tensor)
            self.outside = 0
            for index, layer in enumerate(decoder_layers(model.llm)):
                layer.register_forward_pre_hook(self._enter(index), with_kwargs=True)
                layer.register_forward_hook(self._leave)
            with torch.autograd.graph.saved_tensors_hooks(self._count, lambda t: t):
                batch.images = torch.empty(load.images, *image_shape, dtype=self.dtype)
                self._forward(batch, packing, batch.input_ids.numel())

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _forward(self, batch: Batch, packing: Packing | None, targets: int) -> None:
        """The model's own steps; what depends on values (packing, which positions are targets) is given."""
        model = self.model
        conditioning = model.condition(batch)
        if conditioning.weights is not None:
            for factor in conditioning.weights.a.values():  # inputs of the layers: recomputation does not free them
                self._count(factor)
                self.transient += factor.nbytes  # and their gradients, collected by the backward pass
        inputs = model.inputs(batch, conditioning, packing)
        targets = min(targets, inputs.positions)
        at = torch.arange(targets)
        model.decode(inputs, at, torch.zeros(targets, dtype=torch.int64))
        # At the end of the forward pass: logits of a chunk, their log-probabilities and, in bf16, a copy.
        logits = min(targets * model.llm.get_output_embeddings().out_features, loss.CHUNK_LOGITS)
        # At the start of the backward pass: gradients of a layer's widest activations.
        widest = max(m.out_features for m in decoder_layers(model.llm)[-1].modules() if isinstance(m, nn.Linear))
        layer = 3 * inputs.positions * widest * self.dtype.itemsize
        self.transient += max(logits * (8 + (self.dtype.itemsize < 4) * 2), layer)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # held, so that no other storage gets its number
            if self._layer is None:
                self.outside += storage.nbytes()
            else:
                self.layers[self._layer] = self.layers.get(self._layer, 0) + storage.nbytes()
        return tensor

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            for value in kwargs.values():  # the mask and the rotary tables: the layers share them
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        self._count(tensor)
            self._layer = index
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad or any(p.requires_grad for p in module.parameters()):
                self.inputs += hidden.nbytes

        return hook

    def _leave(self, *_: object) -> None:
        self._layer = None


def _batch(load: Workload, length: int) -> Batch:
    """A micro-batch of `load` whose rows all have `length` tokens; without its images."""
    samples = [row * load.samples // load.rows for row in range(load.rows)]
    ids = torch.zeros(load.rows, length, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        row_to_sample=torch.tensor(samples),
        images=torch.empty(0),
        image_to_sample=torch.tensor([image * load.samples // load.images for image in range(load.images)]),
        image_weight=torch.ones(load.images),
        n_samples=load.samples,
    )


def describe(config: RunConfig, world_size: int, load: Workload, found: MemoryPlan, limit: int | None) -> str:
    """The plan as text, GiB per rank."""
    engine = config.engine
    assumed = "data.expected_length" if config.data.expected_length else "the longest that data.max_length allows"
    lengths = "longest row of the data" if load.measured else f"{assumed}, as the data or the tokenizer are not here"
    lines = [
        f"memory per rank, estimated, GiB: {world_size} ranks, ZeRO-{engine.zero_stage}, {engine.precision}",
        f"micro-batch: {load.samples} samples, {load.rows} rows of {load.length} tokens ({lengths})"
        + (f", packed at {load.mean_length:.0f} on average" if config.llm.pack_tokens else ""),
    ]
    for name in ("weights", "gradients", "optimizer", "buffers", "activations", "checkpointed"):
        label = {"checkpointed": "  recomputed", "buffers": "gathered, buckets"}.get(name, name)
        lines.append(f"{label:<20}{getattr(found, name) / 2**30:>8.2f}")
    if engine.offload_optimizer:
        lines.append(f"{'in host memory':<20}{found.host / 2**30:>8.2f}")
    for checkpointing in (False, True):
        kept = "with layers recomputed" if checkpointing else "with all activations"
        label = f"total {kept} (gradient_checkpointing={str(checkpointing).lower()})"
        lines.append(f"{label:<64}{found.total(checkpointing) / 2**30:>8.2f}")
    if limit is None:
        lines.append("fits? set engine.memory_gib to the memory of a rank of the machine this will run on, to know")
    else:
        whose = "engine.memory_gib" if engine.memory_gib is not None else "a rank's share of this machine"
        fits = next((mode for mode in (False, True) if found.total(mode) <= USABLE * limit), None)
        verdict = f"fits with gradient_checkpointing={str(fits).lower()}, which `auto` takes"
        if fits is None:
            verdict = "DOES NOT FIT, even with layers recomputed: lower engine.micro_batch_size"
        lines.append(f"of {limit / 2**30:.1f} GiB ({whose}), {USABLE:.0%} usable: {verdict}")
    return "\n".join(lines)
