"""Every key of a run's configuration, typed. Hydra composes `conf/` into it (`train.config.compose`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from common.errors import ConfigError
from common.settings import setting
from model.config import (
    ConnectorConfig,
    GeneratorConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    OpsConfig,
    VisionConfig,
)
from train.data.config import DataConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of `engine.precision`."""
STAGES = ("pretrain", "finetune")
OPTIMIZERS = ("adamw", "deepspeed_cpu_adam", "deepspeed_fused_adam", "apex_fused_adam")
SCHEDULES = ("cosine", "constant")
EXPORTS = ("last", "best")
COMPILERS = ("inductor", "aot_eager")
WANDB = ("online", "offline", "disabled")
_RATE = "(0, 10]"
_COUNT = "[1, 1e9]"
_ELEMENTS = "[1, 1e13]"


@dataclass
class TrainedParts:
    """Which parts of the model are trained.

    Attributes:
        connector: The generator, or the projector.
        llm: The language model; `lora`: low-rank adapters of it (finetuning).
        vision: The vision encoder.
    """

    connector: bool = True
    llm: Any = setting(False, choices=(False, True, "lora"))
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
        freeze_lower: Keep the LLM's embeddings and decoder layers below the first that the image reaches frozen. With
            `connector=vlora` that is the first with a delta; with visual tokens in the input it is layer 0.
        lora: The adapters of `train.llm=lora`.
    """

    name: str = setting("pretrain", choices=STAGES)
    steps: int | None = setting(None, within=_COUNT)
    epochs: float | None = setting(1.0, within="(0, 1e6]")
    train: TrainedParts = field(default_factory=TrainedParts)
    freeze: list[str] = field(default_factory=list)
    freeze_lower: bool = False
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class LearningRates:
    """Peak learning rate per parameter group; null: that of `connector`.

    Attributes:
        connector: The generator (or projector) without heads and B.
        heads: The generator's linear heads.
        output_factors: The learned factors B.
        llm: The language model, or its adapters.
        vision: The vision encoder.
    """

    connector: float = setting(5e-5, within=_RATE)
    heads: float | None = setting(None, within=_RATE)
    output_factors: float | None = setting(None, within=_RATE)
    llm: float | None = setting(None, within=_RATE)
    vision: float | None = setting(None, within=_RATE)


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

    name: str = setting("adamw", choices=OPTIMIZERS)
    lr: LearningRates = field(default_factory=LearningRates)
    betas: list[float] = setting(factory=lambda: [0.9, 0.999], within="[0, 1)")
    eps: float = setting(1e-8, within="(0, 1]")
    weight_decay: float = setting(0.0, within="[0, 10]")
    schedule: str = setting("cosine", choices=SCHEDULES)
    warmup_ratio: float = setting(0.03, within="[0, 1)")
    min_lr_ratio: float = setting(0.0, within="[0, 1]")
    grad_clip: float = setting(1.0, within="[0, 1e6]")

    def check(self, prefix: str) -> None:
        """Two betas.

        Raises:
            ConfigError: another number of them.
        """
        if len(self.betas) != 2:
            raise ConfigError(f"{prefix}betas={self.betas}: give two numbers")


@dataclass
class EngineConfig:
    """DeepSpeed. Every value is ours: DeepSpeed's own defaults and its "auto" are never relied on.

    Attributes:
        zero_stage: 0 to 3.
        precision: `fp32` or `bf16` (fp32 master weights and gradient accumulation).
        micro_batch_size: Samples per rank and forward pass at most; null: the rank's whole share of the batch.
        gradient_checkpointing: Recompute the decoder layers in the backward pass (non-reentrant): `true`, `false`, or
            `auto`: where `train.measure.memory` estimates that a step does not fit without (docs/performance.md).
        compile: Backend of `torch.compile` for the decoder layers, `inductor` or (to find faults) `aot_eager`; null:
            none. Needs `zero_stage` 0 to 2 (docs/performance.md).
        memory_gib: Memory of one rank, for `auto`; null: the GPU's, or the host's divided by its ranks.
        overlap_comm, reduce_bucket_size, prefetch_bucket_size, persistence_threshold, max_live_parameters,
            sub_group_size: ZeRO-3's settings of these names; sizes in elements.
        reduce_scatter: Reduce gradients by reduce-scatter; false: by all-reduce, each rank keeping its part.
        reduce_dtype: What gradients are rounded to while they cross the ranks, `fp32` or `bf16`; null: `precision`.
        offload_optimizer: Keep gradients and optimizer state in host memory, where DeepSpeed's CPU optimizer steps.
            Needs `optim.name=deepspeed_cpu_adam`, which is compiled once per node (docs/performance.md).
        timeout_minutes: A collective that takes longer ends the run.
        hang_minutes: A rank that has not moved for so long, once it has trained, has all ranks write their stacks to
            `RUN_DIR/hang`, and the run ends as after a crash (a cluster requeues it); null: not watched. Shorter than
            `timeout_minutes`, longer than the slowest step, answer or checkpoint.
        max_skipped_steps: Consecutive steps with a non-finite gradient after which the run ends.
        deterministic: Deterministic algorithms only.
    """

    zero_stage: int = setting(3, choices=(0, 1, 2, 3))
    precision: str = setting("bf16", choices=tuple(DTYPES))
    micro_batch_size: int | None = setting(None, within=_COUNT)
    gradient_checkpointing: Any = setting(False, choices=(True, False, "auto"))
    compile: str | None = setting(None, choices=COMPILERS)
    memory_gib: float | None = setting(None, within="(0, 1e6]")
    overlap_comm: bool = True
    reduce_scatter: bool = True
    reduce_dtype: str | None = setting(None, choices=tuple(DTYPES))
    reduce_bucket_size: int = setting(50_000_000, within=_ELEMENTS)
    prefetch_bucket_size: int = setting(50_000_000, within=_ELEMENTS)
    persistence_threshold: int = setting(100_000, within="[0, 1e13]")
    max_live_parameters: int = setting(1_000_000_000, within=_ELEMENTS)
    sub_group_size: int = setting(1_000_000_000, within=_ELEMENTS)
    offload_optimizer: bool = False
    timeout_minutes: float = setting(30.0, within="[0.1, 1e5]")
    hang_minutes: float | None = setting(20.0, within="[0.02, 1e5]")
    max_skipped_steps: int = setting(5, within=_COUNT)
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

    mode: str = setting("local", choices=("local", "none"))
    workers: int | None = setting(None, within="[1, 65536]")
    threads_per_worker: int | None = setting(None, within="[1, 1024]")


@dataclass
class CheckpointConfig:
    """Resumable engine checkpoints, and what is exported.

    Attributes:
        every: Steps between checkpoints; null: only at the end and on a signal.
        keep: Complete checkpoints kept, the newest ones. That of the lowest validation loss is kept besides.
        background: Write while training goes on, from a copy of the rank's optimizer state in host memory.
        export: `last`: the weights of the last step; `best`: those of the lowest validation loss. A finished run that
            is started again with the other one exports anew.
    """

    every: int | None = setting(500, within=_COUNT)
    keep: int = setting(2, within=_COUNT)
    background: bool = True
    export: str = setting("last", choices=EXPORTS)


@dataclass
class TrackingConfig:
    """What is written about a run. `metrics.jsonl` is always written.

    Attributes:
        wandb: `online`, `offline` or `disabled`.
        project, group, name, tags: As wandb names them; null: name and group are the run directory's place below
            `output_root`, and that of its folder.
        log_every: Steps between records of memory and TFLOP/s; losses and speed are recorded at every step.
        weights_every: Steps between records of |dW| / |W| per layer and type and of the image share of A.
        num_samples: Rows of the table of sample images, questions, answers and predictions (`evaluation.every`).
        min_image_share: Warn when the share of A's energy that varies with the image falls below it.
        max_loss_rise: Warn when the mean loss of ten steps lies further above the lowest such mean; nats per target.
    """

    wandb: str = setting("offline", choices=WANDB)
    project: str = "vlora"
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_every: int = setting(10, within=_COUNT)
    weights_every: int = setting(50, within=_COUNT)
    num_samples: int = setting(16, within="[1, 1000]")
    min_image_share: float = setting(0.01, within="[0, 1]")
    max_loss_rise: float = setting(0.3, within="(0, 1000]")

    def check(self, prefix: str) -> None:
        """What wandb takes.

        Raises:
            ConfigError: a character or a length that it refuses.
        """
        if wrong := sorted(set(self.project) & set("/\\#?%:")):
            raise ConfigError(f"{prefix}project={self.project}: wandb allows no {' '.join(wrong)} in it")
        for key, longest in (("project", 128), ("group", 128), ("name", 128)):
            if len(getattr(self, key) or "") > longest:
                raise ConfigError(f"{prefix}{key}={getattr(self, key)}: wandb allows {longest} characters at most")
        for tag in self.tags:
            if len(tag) > 64:
                raise ConfigError(f"{prefix}tags={tag}: wandb allows 64 characters at most")


@dataclass
class EvaluationConfig:
    """Validation during a stage, and defaults of `python -m train.evaluate`.

    Attributes:
        every: Steps between validations (loss and sample table on `data.val`); null: only at the end.
        batch_size: Questions per forward.
        max_new_tokens: Longest answer in tokens, without what the template puts before it (an empty think block).
        max_samples: A fixed random subset of the questions; null: all.
        val_dialogues: Held-out dialogues for the validation loss.
    """

    every: int | None = setting(None, within=_COUNT)
    batch_size: int = setting(64, within="[1, 1e6]")
    max_new_tokens: int = setting(16, within="[1, 1e6]")
    max_samples: int | None = setting(None, within=_COUNT)
    val_dialogues: int | None = setting(256, within=_COUNT)


@dataclass
class DebugConfig:
    """Looking into a run; changes nothing of what it computes.

    Attributes:
        profile: Steps that every rank traces with torch.profiler into `RUN_DIR/profile`, e.g. `[20,21]`.
        memory_history: Allocations of each GPU that are remembered with their stacks, for the snapshot that a run out
            of memory leaves there; 0: the snapshot shows what is allocated, not by whom.
    """

    profile: list[int] = setting(factory=list, within=_COUNT)
    memory_history: int = setting(0, within="[0, 1e9]")


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
    debug: DebugConfig = field(default_factory=DebugConfig)
    seed: int = setting(0, within="[0, 4294967295]")
    init_from: str | None = setting(None, path=True)
    run_dir: str | None = setting(None, path=True)
    output_root: str = setting("outputs", path=True)
    cache_dir: str = setting(".cache", path=True)
    check: bool = False

    @property
    def model(self) -> ModelConfig:
        """The part that `model` reads."""
        return ModelConfig(self.llm, self.vision, self.generator, self.connector)
