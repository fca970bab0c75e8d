"""`python -m train.plan experiment=NAME [nodes=1,4] [overrides]`: what a run will need, with LLaVA beside it.

    python -m train.plan experiment=vlora_7b nodes=1,3
    python -m train.plan experiment=vlora_7b stage=finetune gpu=H100 memory_gib=80 mfu=0.35
    python -m train.plan experiment=vlora_qwen3_4b beside="connector=qformer connector.num_queries=64"

One table: parameters by part, ZeRO's memory, the largest micro-batch, FLOPs of a sample by part, what crosses the
ranks, and the step that follows from stated rates. Built on the meta device: no weights, no data. Nothing in it is
measured; `train.preflight` measures the links, a run its own MFU. Loading of data is not part of it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields, replace

import torch

from common.errors import ConfigError, run_cli
from common.options import parse_options
from common.settings import setting
from model.flops import linear_weights
from model.generator.placement import decoder_layers
from model.vlm import VisionLanguageModel, build_model
from train.config import DTYPES, RunConfig, compose_overrides, resolve
from train.engine.engine import freeze
from train.measure import memory
from train.measure.flops import PEAK, FlopCounter, first_layer_with_a_graph
from train.measure.summary import parameter_counts

GIB = 2.0**30
# Text tokens of an average sample, and how many of them are learned: a caption of CapsFusion, and a conversation of
# LLaVA's mix (assumed).
TEXT = {"pretrain": (48, 48), "finetune": (260, 130)}


@dataclass
class Options:
    """Keys of the command line beside the overrides of `python -m train`.

    Attributes:
        nodes: Numbers of nodes to plan for, with commas.
        gpus_per_node: Ranks of a node.
        gpu: A100, H100, H200, H800, A800 or B200: its dense bf16 peak.
        memory_gib: Memory of one GPU, GiB.
        mfu: Share of the peak that the arithmetic reaches (assumed; a run's metrics have its own).
        node_gb_s: What one GPU receives from others of its node, GB/s.
        network_gb_s: What one GPU receives from other nodes, GB/s.
        text_tokens: Of an average sample; null: 48 in pretraining, 260 in finetuning.
        beside: Overrides of the system to compare with; null: none.
    """

    nodes: str = "1"
    gpus_per_node: int = setting(8, within="[1, 1024]")
    gpu: str = setting("A100", choices=tuple(PEAK))
    memory_gib: float = setting(80.0, within="(0, 1e4]")
    mfu: float = setting(0.4, within="(0, 1]")
    node_gb_s: float = setting(200.0, within="(0, 1e5]")
    network_gb_s: float = setting(20.0, within="(0, 1e5]")
    text_tokens: int | None = setting(None, within="[1, 1e7]")
    beside: str | None = "connector=mlp"


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch of m samples keeps: `fixed + m * each`, whole and with the layers recomputed."""

    fixed: tuple[float, float]
    each: tuple[float, float]

    @classmethod
    def of(cls, config: RunConfig, load: memory.Workload) -> Activations:
        """From two micro-batches of rows like those of `load`."""
        few, more = (memory.plan(config, 1, _scaled(load, samples)) for samples in (1, 3))
        pairs = [(few.activations, more.activations), (few.checkpointed, more.checkpointed)]
        each = [(b - a) / 2 for a, b in pairs]
        fixed = [a - slope for (a, _), slope in zip(pairs, each, strict=True)]
        return cls((fixed[0], fixed[1]), (each[0], each[1]))

    def largest(self, room: float, recomputed: bool) -> int:
        """Samples whose activations fit into `room` bytes."""
        return max(0, int((room - self.fixed[recomputed]) // self.each[recomputed]))


def _scaled(load: memory.Workload, samples: int) -> memory.Workload:
    views, rows = load.images // load.samples, load.rows // load.samples
    return replace(load, samples=samples, images=samples * views, rows=samples * rows)


def table(config: RunConfig, options: Options, nodes: list[int]) -> list[list[tuple[str, str]]]:
    """One column of (row, value) per number of nodes."""
    model = build_model(config.model, DTYPES[config.engine.precision], meta=True)
    freeze(model, config.stage)
    load = memory.workload(config, None, 1)
    activations = Activations.of(config, load)
    return [_column(config, options, model, activations, load, count) for count in nodes]


def _column(
    config: RunConfig,
    options: Options,
    model: VisionLanguageModel,
    activations: Activations,
    load: memory.Workload,
    nodes: int,
) -> list[tuple[str, str]]:
    world, engine = nodes * options.gpus_per_node, config.engine
    counts = parameter_counts(model)
    column = [(f"parameters: {name}, M", f"{count / 1e6:,.1f}") for name, count in counts.items() if name not in _SUMS]
    column += [(f"parameters: {name}, M", f"{counts[name] / 1e6:,.1f}") for name in _SUMS]
    states = memory.states(model, config, world)
    for name in ("weights", "gradients", "optimizer", "buffers"):
        column.append((f"memory: {name}, GiB", f"{getattr(states, name) / GIB:.2f}"))
    if engine.offload_optimizer:
        column.append(("memory: in the host's, GiB", f"{states.host / GIB:.2f}"))
    usable = memory.USABLE * options.memory_gib * GIB
    room = usable - states.weights - states.gradients - states.optimizer - states.buffers
    most = [activations.largest(room, recomputed) for recomputed in (False, True)]
    column.append((f"rows of {load.length} tokens that fit", f"{most[0]} ({most[1]} recomputed)"))
    share = math.ceil(config.data.batch_size / world)
    recomputed = most[0] < share
    micro = min(share, engine.micro_batch_size or share, max(1, most[recomputed]))
    steps = math.ceil(share / micro)
    column.append(("micro-batch x micro-steps", f"{micro} x {steps}" + (", recomputed" if recomputed else "")))

    text, targets = _text(config, options)
    counter = FlopCounter(model, features_cached=config.vision.cache)
    flops = counter.step(rows=1, text_tokens=text, targets=targets, images=1)
    again = counter.prompt(text) - model.connector.flops() if recomputed else 0.0
    for part in ("vision", "connector", "llm", "deltas"):
        column.append((f"TFLOPs of a sample: {part}", f"{getattr(flops, part) / 1e12:.3f}"))
    column.append(("TFLOPs of a sample: total", f"{flops.total / 1e12:.2f}"))
    gathered, reduced = _crossing(model, config, world)
    received = steps * (gathered + reduced)
    column.append(("GB a rank receives per step", f"{received / 1e9:.1f}"))
    arithmetic = share * (flops.total + again) / (PEAK[options.gpu] * options.mfu)
    exchange = received / (1e9 * (options.network_gb_s if nodes > 1 else options.node_gb_s))
    step = max(arithmetic, exchange) if engine.overlap_comm else arithmetic + exchange
    column += [
        ("step: arithmetic, s", f"{arithmetic:.2f}"),
        ("step: exchange, s", f"{exchange:.2f}"),
        ("step: predicted, s", f"{step:.2f}" if most[recomputed] else "does not fit"),
        ("samples/s", f"{config.data.batch_size / step:,.0f}" if most[recomputed] else "-"),
    ]
    return column


_SUMS = ("trained", "total")


def _text(config: RunConfig, options: Options) -> tuple[int, int]:
    tokens, targets = TEXT[config.stage.name]
    if options.text_tokens is None:
        return tokens, targets
    return options.text_tokens, math.ceil(options.text_tokens * targets / tokens)


def _crossing(model: VisionLanguageModel, config: RunConfig, world: int) -> tuple[float, float]:
    """Bytes that a rank receives per micro-step: gathered parameters, and gradients on their way to their owner."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    size, share = DTYPES[config.engine.precision].itemsize, (world - 1) / world
    reduced = trained * (4 if config.engine.reduce_dtype == "fp32" else size) * share
    if config.engine.zero_stage < 3:
        return 0.0, 2 * reduced  # all-reduce, or reduce-scatter and all-gather
    # Still run backwards, for the gradient of their inputs.
    layers = list(decoder_layers(model.llm))[first_layer_with_a_graph(model) :]
    frozen_above = sum(linear_weights(layer, trained=False) for layer in layers)
    forward = sum(p.numel() for p in parameters)
    return (forward + trained + frozen_above) * size * share, reduced


def render(columns: dict[str, list[tuple[str, str]]]) -> str:
    """Columns side by side; a row that one of them lacks stays empty there."""
    rows = list(dict.fromkeys(name for column in columns.values() for name, _ in column))
    found = {head: dict(column) for head, column in columns.items()}
    # A part that only the second system has stands with the parts of the first.
    rows.sort(key=lambda name: not name.startswith("parameters"))
    width = max(map(len, rows))
    widths = {head: max(len(head), *(len(text) for text in column.values())) + 2 for head, column in found.items()}
    lines = [" " * width + "".join(head.rjust(widths[head]) for head in found)]
    for name in rows:
        lines.append(name.ljust(width) + "".join(found[head].get(name, "").rjust(widths[head]) for head in found))
    return "\n".join(lines)


def configurations(words: list[str]) -> tuple[Options, dict[str, RunConfig]]:
    """Options, and the systems by what their column is called.

    Raises:
        ConfigError: a wrong key or value.
    """
    ours = {field.name for field in fields(Options)}
    help_wanted = [word for word in words if word in ("--help", "-h")]
    options: Options = parse_options(Options, [w for w in words if w.partition("=")[0] in ours] + help_wanted, __doc__)
    overrides = [word for word in words if word.partition("=")[0] not in ours]
    if any(word.startswith("stage=finetune") for word in overrides):
        overrides.append("init_from=-")
    systems = [overrides, *([] if options.beside is None else [[*overrides, *options.beside.split()]])]
    found: dict[str, RunConfig] = {}
    for each in systems:
        config = resolve(compose_overrides(each))
        name = config.connector.name
        found[name if name not in found else f"{name} ({options.beside})"] = config
    return options, found


def main() -> int:
    """Print the plan."""
    options, systems = configurations(sys.argv[1:])
    try:
        nodes = [int(count) for count in options.nodes.split(",")]
    except ValueError as error:
        raise ConfigError(f"nodes={options.nodes}: give whole numbers with commas") from error
    if not 1 <= min(nodes) <= max(nodes) <= 65536:
        raise ConfigError(f"nodes={options.nodes}: each must be at least 1 and at most 65536")
    torch.set_num_threads(1)
    first = next(iter(systems.values()))
    text, targets = _text(first, options)
    print(
        f"{first.stage.name} of {first.llm.path} with {first.vision.path}; ZeRO-{first.engine.zero_stage}, "
        f"{first.engine.precision}, {options.gpus_per_node} x {options.gpu} a node\n"
        f"stated rates: {PEAK[options.gpu] / 1e12:.0f} TFLOP/s peak at {options.mfu:.0%}, {options.node_gb_s:g} GB/s "
        f"inside a node, {options.network_gb_s:g} GB/s between nodes, per GPU; {text} text tokens a sample, {targets} "
        "learned. Nothing here is measured.\n"
    )
    columns: dict[str, list[tuple[str, str]]] = {}
    for name, config in systems.items():
        for count, column in zip(nodes, table(config, options, nodes), strict=True):
            columns[f"{name}, {count} node{'s' * (count > 1)}"] = [
                ("samples a step", str(config.data.batch_size)),
                *column,
            ]
    print(render(columns))
    return 0


if __name__ == "__main__":
    run_cli(main)
