"""The run's configuration: typed, checked as a whole before anything starts, and the same for every rank.

Hydra composes `conf/`; `resolve` turns the result into a `RunConfig`. Workers read the resolved file and know no Hydra.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import (
    ATTENTION,
    KERNELS,
    ConnectorConfig,
    GeneratorConfig,
    LLMConfig,
    ModelConfig,
    OpsConfig,
    VisionConfig,
    parse_types,
)
from model.errors import UserError
from model.kernels import check_kernels, require_nvidia_apex
from model.ops import BACKENDS
from train.data import DataConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of `engine.precision`."""
STAGES = ("pretrain", "finetune")
OPTIMIZERS = ("adamw", "deepspeed_cpu_adam", "deepspeed_fused_adam", "apex_fused_adam")


class ConfigError(UserError):
    """A key or value of the configuration is wrong."""


@dataclass
class TrainedParts:
    """Which parts of the model are trained."""

    connector: bool = True
    llm: bool = False
    vision: bool = False


@dataclass
class StageConfig:
    """What is trained, from what, and for how long.

    Attributes:
        name: `pretrain` or `finetune`.
        steps: Optimizer steps; null: `epochs` passes over the data.
        epochs: Passes over the data, may be a fraction.
        train: Which parts are trained.
        freeze: Glob patterns of parameter names kept frozen all the same, e.g. `llm.model.embed_tokens.*`.
    """

    name: str = "pretrain"
    steps: int | None = None
    epochs: float | None = 1.0
    train: TrainedParts = field(default_factory=TrainedParts)
    freeze: list[str] = field(default_factory=list)


@dataclass
class LearningRates:
    """Peak learning rate per parameter group; null: that of `connector`.

    Attributes:
        connector: The generator (or projector) without heads and B.
        heads: The generator's linear heads.
        output_factors: The learned factors B.
        llm: The language model.
        vision: The vision encoder.
    """

    connector: float = 5e-5
    heads: float | None = None
    output_factors: float | None = None
    llm: float | None = None
    vision: float | None = None


@dataclass
class OptimConfig:
    """Optimizer and schedule.

    Attributes:
        name: `adamw` (torch, fused), `deepspeed_cpu_adam`, `deepspeed_fused_adam`, `apex_fused_adam` (NVIDIA apex).
        lr: Peak learning rates.
        betas, eps: Adam's.
        weight_decay: Not applied to norms, biases, queries, positions and other vectors.
        schedule: `cosine` to `min_lr_ratio` of the peak, or `constant`; both after a linear warm-up.
        warmup_ratio: Share of the steps spent warming up.
        min_lr_ratio: End of the cosine over its peak.
        grad_clip: Largest gradient norm; 0: no clipping.
    """

    name: str = "adamw"
    lr: LearningRates = field(default_factory=LearningRates)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0
    grad_clip: float = 1.0


@dataclass
class EngineConfig:
    """DeepSpeed. Every value is ours: DeepSpeed's own defaults and its "auto" are never relied on.

    Attributes:
        zero_stage: 0 to 3.
        precision: `fp32` or `bf16` (fp32 master weights and gradient accumulation).
        micro_batch_size: Samples per rank and forward pass; null: the rank's whole share of the batch.
        gradient_checkpointing: Recompute the decoder layers in the backward pass (non-reentrant): `true`, `false`, or
            `auto`: where the estimate of `train.memory` says that a step does not fit without (docs/performance.md).
        compile: Backend of `torch.compile` for the decoder layers, `inductor` or (to find faults) `aot_eager`; null:
            none. Needs `zero_stage` 0 to 2 (docs/performance.md).
        memory_gib: Memory of one rank, for `auto`; null: the GPU's, or the host's divided by its ranks.
        overlap_comm, reduce_bucket_size, prefetch_bucket_size, persistence_threshold, max_live_parameters,
            sub_group_size: ZeRO-3's settings of these names; sizes in elements.
        reduce_scatter: Reduce gradients by reduce-scatter; false: by all-reduce, each rank keeping its part.
        reduce_dtype: What gradients are rounded to while they cross the ranks, `fp32` or `bf16`; null: `precision`.
        offload_optimizer: Keep optimizer state in host memory.
        timeout_minutes: A collective that takes longer ends the run.
        max_skipped_steps: Consecutive steps with a non-finite gradient after which the run ends.
        deterministic: Deterministic algorithms only.
    """

    zero_stage: int = 3
    precision: str = "bf16"
    micro_batch_size: int | None = None
    gradient_checkpointing: Any = False
    compile: str | None = None
    memory_gib: float | None = None
    overlap_comm: bool = True
    reduce_scatter: bool = True
    reduce_dtype: str | None = None
    reduce_bucket_size: int = 50_000_000
    prefetch_bucket_size: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    offload_optimizer: bool = False
    timeout_minutes: float = 30.0
    max_skipped_steps: int = 5
    deterministic: bool = True


@dataclass
class LaunchConfig:
    """Processes of a run.

    Attributes:
        mode: `local`: start them on this machine; `none`: only prepare the run directory (on a cluster SLURM starts
            them, see `slurm/`).
        workers: Processes; null: one per GPU, or one without a GPU.
        threads_per_worker: CPU threads of each; null: cores divided by workers.
    """

    mode: str = "local"
    workers: int | None = None
    threads_per_worker: int | None = None


@dataclass
class CheckpointConfig:
    """Resumable engine checkpoints.

    Attributes:
        every: Steps between checkpoints; null: only at the end and on a signal.
        keep: Complete checkpoints kept.
    """

    every: int | None = 500
    keep: int = 2


@dataclass
class TrackingConfig:
    """What is written about a run. `metrics.jsonl` is always written.

    Attributes:
        wandb: `online`, `offline` or `disabled`.
        project, group, name, tags: As wandb names them; name null: that of the run directory.
        log_every: Steps between records.
        weights_every: Steps between records of |dW| / |W| per layer and type and of the image share of A.
        samples_every: Steps between tables of sample images, questions, answers and predictions; null: at the end.
        num_samples: Rows of that table.
        min_image_share: Warn when the share of A's energy that varies with the image falls below it.
    """

    wandb: str = "offline"
    project: str = "vlora"
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every: int = 10
    weights_every: int = 50
    samples_every: int | None = None
    num_samples: int = 16
    min_image_share: float = 0.01


@dataclass
class EvaluationConfig:
    """Defaults of `python -m train.evaluate`.

    Attributes:
        batch_size: Questions per forward.
        max_new_tokens: Longest answer.
        max_samples: A fixed random subset of the questions; null: all.
        val_dialogues: Held-out dialogues for the validation loss at the end of a stage.
    """

    batch_size: int = 64
    max_new_tokens: int = 16
    max_samples: int | None = None
    val_dialogues: int | None = 256


@dataclass
class RunConfig:
    """One run.

    Attributes:
        seed: Of initialisation and data order.
        init_from: Run directory whose exported weights this one starts from.
        run_dir: Where everything about the run goes; null: a new directory below `output_root`.
        output_root: See `run_dir`.
        cache_dir: Converted third-party parts and cached features.
        check: Compose, validate and print the model's table; train nothing.
    """

    llm: LLMConfig = field(default_factory=LLMConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    init_from: str | None = None
    run_dir: str | None = None
    output_root: str = "outputs"
    cache_dir: str = ".cache"
    check: bool = False

    @property
    def model(self) -> ModelConfig:
        """The part that `model` reads."""
        return ModelConfig(self.llm, self.vision, self.generator, self.connector)


# The schema is the first entry of conf/config.yaml's defaults, so every key can be set on the command line, typed.
ConfigStore.instance().store("schema", node=RunConfig)


def resolve(composed: DictConfig) -> RunConfig:
    """Check a composed configuration against the schema and its cross-field rules.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, or a rule broken; names the key.
    """
    try:
        # As plain containers: Hydra lets `+key=value` add keys to a typed node, merging into a fresh one does not.
        plain = OmegaConf.create(OmegaConf.to_container(composed))
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    validate(config)
    return config


def parse_options(schema: type, arguments: list[str]) -> Any:
    """An instance of the dataclass `schema` from `key=value` arguments, for the commands that are no Hydra programs.

    Raises:
        ConfigError: unknown key (with the nearest one), wrong type, or no value for a key that needs one.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(arguments)))
    except OmegaConfBaseException as error:
        raise explain(error, schema_keys(schema)) from error


def explain(error: Exception, known: list[str] | None = None) -> ConfigError:
    """Hydra's or OmegaConf's complaint as one line that names the key and the nearest known one."""
    text = str(error.__cause__ or error)
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if match := re.search(r"(?:full_key: |[Kk]ey ')([\w.\[\]]+)", text):
        key = key or match.group(1)
    first = text.strip().splitlines()[0]
    known = schema_keys() if known is None else known
    if key and key not in known and ("not in" in text or "Missing key" in text):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return ConfigError(f"unknown configuration key `{key}`{hint}")
    if "Missing mandatory value" in text or "MissingMandatoryValue" in type(error).__name__:
        return ConfigError(f"configuration key `{key}` has no value; set it on the command line: {key}=...")
    return ConfigError(f"configuration key `{key}`: {first}" if key else first)


def schema_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        nested = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(nested):
            keys += schema_keys(type(nested), f"{prefix}{f.name}.")
    return keys


def validate(config: RunConfig) -> None:
    """Rules that concern more than one key or a key's range; those that need the model's shapes come when it is built.

    Raises:
        ConfigError: names key, value and what to do.
    """

    def check(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    def one_of(key: str, value: Any, choices: tuple[Any, ...]) -> None:
        if value not in choices or isinstance(value, int) != isinstance(value, bool):  # 1 is not true
            known = [str(c).lower() if isinstance(c, bool) else c for c in choices]
            near = difflib.get_close_matches(str(value), known, n=1)
            raise ConfigError(
                f"{key}={value}: choose one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
            )

    stage, engine, optim, generator = config.stage, config.engine, config.optim, config.generator
    one_of("stage.name", stage.name, STAGES)
    one_of("engine.precision", engine.precision, ("fp32", "bf16"))
    one_of("engine.reduce_dtype", engine.reduce_dtype or "fp32", ("fp32", "bf16"))
    one_of("optim.name", optim.name, OPTIMIZERS)
    one_of("optim.schedule", optim.schedule, ("cosine", "constant"))
    one_of("tracking.wandb", config.tracking.wandb, ("online", "offline", "disabled"))
    one_of("launch.mode", config.launch.mode, ("local", "none"))
    one_of("connector.name", config.connector.name, ("vlora", "mlp", "qformer"))
    one_of("generator.init", generator.init, ("paper", "stable"))
    one_of("ops.backend", config.ops.backend, BACKENDS)
    one_of("engine.compile", engine.compile, (None, "inductor", "aot_eager"))
    one_of("engine.gradient_checkpointing", engine.gradient_checkpointing, (True, False, "auto"))
    check(engine.memory_gib is None or engine.memory_gib > 0, f"engine.memory_gib={engine.memory_gib}: must be above 0")
    check(engine.zero_stage in (0, 1, 2, 3), f"engine.zero_stage={engine.zero_stage}: choose 0, 1, 2 or 3")
    check(
        engine.compile is None or engine.zero_stage < 3,
        f"engine.compile={engine.compile} needs engine.zero_stage=2 or less: ZeRO-3 gathers parameters in hooks around "
        "every module, which torch.compile cannot look through",
    )
    try:
        parse_types(generator.types)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key in ("rank", "num_blocks", "width", "num_heads"):
        check(getattr(generator, key) > 0, f"generator.{key}={getattr(generator, key)}: must be above 0")
    check(
        (stage.steps is None) != (stage.epochs is None),
        f"stage.steps={stage.steps} and stage.epochs={stage.epochs}: give one of the two (the other null)",
    )
    check(stage.steps is None or stage.steps > 0, f"stage.steps={stage.steps}: must be above 0")
    check(stage.train.connector or stage.train.llm or stage.train.vision, "stage.train: nothing is trained")
    check(
        stage.name == "pretrain" or config.init_from is not None,
        "stage=finetune needs init_from=RUN_DIR_OF_THE_PRETRAINING",
    )
    check(
        not (config.vision.cache and stage.train.vision),
        "vision.cache=true reads features of a frozen encoder, but stage.train.vision=true trains it; set one to false",
    )
    check(
        not (config.vision.cache and config.vision.image_mode == "tiles"),
        "vision.cache=true keeps one set of features per image, but vision.image_mode=tiles makes several views of it; "
        "set vision.cache=false or another image_mode",
    )
    check(0 <= optim.warmup_ratio < 1, f"optim.warmup_ratio={optim.warmup_ratio}: must be at least 0 and below 1")
    check(len(optim.betas) == 2, f"optim.betas={optim.betas}: give two numbers")
    check(optim.grad_clip >= 0, f"optim.grad_clip={optim.grad_clip}: must not be negative (0: no clipping)")
    micro = engine.micro_batch_size
    check(
        micro is None or (micro > 0 and config.data.batch_size % micro == 0),
        f"engine.micro_batch_size={micro} does not divide data.batch_size={config.data.batch_size}",
    )
    tokens = config.data.tokens_per_micro_batch
    check(
        tokens is None or micro is None,
        f"engine.micro_batch_size={micro} and data.tokens_per_micro_batch={tokens}: give one, the other null",
    )
    check(
        tokens is None or engine.zero_stage == 3,
        f"data.tokens_per_micro_batch={tokens}: a changing number of micro-steps needs engine.zero_stage=3",
    )
    check(
        not (engine.offload_optimizer and optim.name != "deepspeed_cpu_adam"),
        f"engine.offload_optimizer=true needs optim.name=deepspeed_cpu_adam, not {optim.name}",
    )
    check(config.checkpoint.keep >= 1, f"checkpoint.keep={config.checkpoint.keep}: keep at least one")
    one_of("llm.attn_implementation", config.llm.attn_implementation, ATTENTION)
    one_of("llm.kernels", config.llm.kernels, KERNELS)
    check(config.llm.pack_tokens is None or config.llm.pack_tokens > 0, "llm.pack_tokens must be above 0")
    if config.llm.attn_implementation == "flash_attention_2":
        check(engine.precision == "bf16", "llm.attn_implementation=flash_attention_2 needs engine.precision=bf16")
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "llm.attn_implementation=flash_attention_2: the package flash_attn is not installed; install it on the "
                "GPU machine (pip install flash-attn --no-build-isolation), or set llm.attn_implementation=sdpa"
            )
    check_kernels(config.llm.kernels)
    if optim.name == "apex_fused_adam":
        require_nvidia_apex("optim.name=apex_fused_adam", "optim.name=adamw")


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-steps per optimizer step.

    Raises:
        ConfigError: the batch does not divide among ranks and micro-batches.
    """
    batch, micro = config.data.batch_size, config.engine.micro_batch_size
    if batch % world_size:
        raise ConfigError(f"data.batch_size={batch} samples do not divide among {world_size} ranks")
    share = batch // world_size
    if micro is not None and share % micro:
        raise ConfigError(
            f"data.batch_size={batch} over {world_size} ranks is {share} samples each, "
            f"which engine.micro_batch_size={micro} does not divide"
        )
    return 1 if micro is None else share // micro


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def load(path: Path) -> RunConfig:
    """Read what `save` wrote.

    Raises:
        ConfigError: no such file, or not a run configuration of this version.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; is this a run directory?")
    return resolve(OmegaConf.load(path))
