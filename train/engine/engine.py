"""The DeepSpeed engine: built from our typed configuration, with ZeRO-3's known traps closed.

Numbers in comments refer to what was measured with DeepSpeed 0.19.8 on CPU ranks.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.decoder.injection import SharedInput
from model.decoder.lora import add_adapters
from model.generator.placement import decoder_layers
from model.vlm import VisionLanguageModel
from train.config import OptimConfig, RunConfig, StageConfig
from train.process import watchdog

if TYPE_CHECKING:  # imported where an engine is built: plans need none of it, and it takes seconds
    import deepspeed


def deepspeed_config(config: RunConfig, world_size: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON, every value spelled out: its "auto" silently turns into a default outside the HF Trainer,
    and its default gradient clipping is 1.0.
    """
    engine = config.engine
    samples = config.data.batch_size // (world_size * accumulation)
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": samples,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.data.batch_size,
        "gradient_clipping": config.optim.grad_clip,
        "communication_data_type": engine.reduce_dtype or engine.precision,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Ignore"},  # the tag is made of the step: two all-reduces less
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap_comm,
            "reduce_scatter": engine.reduce_scatter,
            "contiguous_gradients": True,
            "reduce_bucket_size": engine.reduce_bucket_size,
        },
    }
    if engine.zero_stage == 3:
        ds["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": engine.prefetch_bucket_size,
            "stage3_param_persistence_threshold": engine.persistence_threshold,
            "stage3_max_live_parameters": engine.max_live_parameters,
            "sub_group_size": engine.sub_group_size,
        }
    if engine.offload_optimizer:
        ds["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.precision == "bf16":
        ds["bf16"] = {"enabled": True}
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
    return ds


def freeze(model: VisionLanguageModel, stage: StageConfig) -> None:
    """Set `requires_grad` as the stage says; with `stage.train.llm=lora`, adapt what would have been trained.

    Raises:
        UserError: a `stage.freeze` pattern that matches no parameter.
        ValueError: adapters that this LLM cannot have.
    """
    for part in ("connector", "llm", "vision"):
        module = getattr(model, part)
        if module is not None:
            module.requires_grad_(bool(getattr(stage.train, part)))
    names = [name for name, _ in model.named_parameters()]
    for pattern in stage.freeze:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UserError(f"stage.freeze: {pattern!r} matches no parameter; names look like {names[-1]!r}")
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
    if stage.freeze_lower:
        for module in (model.llm.get_input_embeddings(), *decoder_layers(model.llm)[: model.connector.first_layer]):
            module.requires_grad_(False)
    if stage.train.llm == "lora":
        add_adapters(model.llm, stage.lora)


def part_of(name: str) -> str:
    """The parameter group's part that a parameter belongs to."""
    if name.startswith("connector.generator.output_factors."):
        return "output_factors"
    if name.startswith("connector.generator.stacks.") and ".heads." in name:
        return "heads"
    return name.split(".", 1)[0]


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Optimizer groups of the trained parameters: one per part and decay, named `part` or `part/no_decay`.

    Vectors (norms, biases) and the generator's queries and positions carry no weight decay.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        lr = getattr(optim.lr, part)
        lr = optim.lr.connector if lr is None else lr
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a partitioned parameter is empty itself
        plain = len(shape) < 2 or name.endswith(("queries", "pos_embed"))
        key = f"{part}/no_decay" if plain and optim.weight_decay else part
        decay = 0.0 if plain else optim.weight_decay
        group = groups.setdefault(key, {"name": key, "params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def read_elsewhere(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of other modules that a module's forward reads.

    ZeRO-3 has a parameter whole only in the forward of its owner. It learns of another reader by itself in a training
    step only, and a run may begin with an evaluation, so every reader is made known when the engine is built.
    """
    if isinstance(module, SharedInput):
        return module.parameters_read()
    if isinstance(module, nn.MultiheadAttention):  # reads `out_proj.weight`, but never calls `out_proj`
        return list(module.out_proj.parameters())
    return []


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer named in the configuration."""
    options = {"lr": optim.lr.connector, "betas": tuple(optim.betas), "eps": optim.eps}
    match optim.name:
        case "adamw":
            return torch.optim.AdamW(groups, **options, fused=True)
        case "deepspeed_cpu_adam":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
        case "deepspeed_fused_adam":
            from deepspeed.ops.adam import FusedAdam

            return FusedAdam(groups, **options, adam_w_mode=True)
        case "apex_fused_adam":
            from apex.optimizers import FusedAdam as ApexAdam

            return ApexAdam(groups, **options, adam_w_mode=True)
    raise UserError(f"optim.name={optim.name!r} is unknown")


def schedule(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at step 0, 1, ...: linear warm-up, then cosine or constant.

    Our own rather than DeepSpeed's WarmupCosineLR, whose first step has learning rate 0 and lags by one.
    """
    warmup = math.ceil(optim.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optim.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    Attributes:
        grad_norm: Before clipping; inf or NaN when the step was skipped.
        applied: Whether the weights changed.
    """

    grad_norm: float
    applied: bool


class Engine:
    """Forward, backward and step of one model under DeepSpeed.

    The loss given to `backward` is a sum over this micro-batch's targets; the gradient is that of the mean over *all*
    targets of the step, on all ranks, so ranks and micro-batches weigh by their tokens.
    """

    def __init__(self, model: VisionLanguageModel, config: RunConfig, total_steps: int, accumulation: int) -> None:
        import deepspeed

        self.config, self.accumulation = config, accumulation
        world = torch.distributed.get_world_size()
        if config.engine.gradient_checkpointing:
            model.checkpoint_layers()
        if config.engine.compile:
            model.compile_layers(config.engine.compile)
        groups = parameter_groups(model, config.optim)
        factor = schedule(config.optim, total_steps)
        buffers = {name: buffer.clone() for name, buffer in model.connector.named_buffers()}
        for module in model.modules():
            for parameter in read_elsewhere(module):
                deepspeed.zero.register_external_parameter(module, parameter)
        self._ds, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=model,
            model_parameters=[p for g in groups for p in g["params"]],
            optimizer=build_optimizer(groups, config.optim),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=deepspeed_config(config, world, accumulation),
        )
        # In bf16 DeepSpeed rounds buffers too; the connector's statistics stay as they were.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            model.connector.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
        if persistent := getattr(self._ds.optimizer, "persistent_parameters", None):
            # DeepSpeed gathers these anew after every step, the frozen ones too, which no step changes: with a frozen
            # LLM kept whole that was a sixth of a step.
            self._ds.optimizer.persistent_parameters = [p for p in persistent if p.requires_grad]
        self.group_names = [g["name"] for g in groups]
        self.world_size = world
        self._skipped = 0
        self.model.train()

    @property
    def model(self) -> VisionLanguageModel:
        """The module itself."""
        return self._ds.module

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._ds.device

    @property
    def zero_stage(self) -> int:
        """The stage DeepSpeed really runs."""
        return self._ds.zero_optimization_stage()

    @property
    def deepspeed(self) -> deepspeed.DeepSpeedEngine:
        """DeepSpeed's engine, for checkpoints."""
        return self._ds

    def begin_micro_step(self, last: bool) -> None:
        """Say whether this is the step's last micro-step, where its number changes from step to step; before the
        forward pass. Without it, each `accumulation` of them make a step.
        """
        self._ds.set_gradient_accumulation_boundary(last)

    def forward(self, batch: Any) -> Any:
        """The model's forward with ZeRO's hooks around it."""
        watchdog.beat()
        return self._ds(batch)

    def backward(self, loss_sum: Tensor, total_targets: int) -> None:
        """Backward pass of one micro-batch.

        Args:
            loss_sum: Summed loss of this micro-batch on this rank.
            total_targets: Targets of the whole step: all micro-batches, all ranks.
        """
        # DeepSpeed 0.19.8 tells its optimizer only after the backward pass whether it was the step's last one. What was
        # reduced during it, bucket by bucket, would go to an offloaded optimizer one micro-step late.
        if hasattr(self._ds.optimizer, "set_gradient_accumulation_boundary"):
            self._ds.optimizer.set_gradient_accumulation_boundary(self._ds.is_gradient_accumulation_boundary())
        # It divides by the micro-steps and averages over ranks.
        self._ds.backward(loss_sum * (self.world_size * self.accumulation / total_targets))

    def micro_step(self) -> None:
        """End a micro-step; the last one of a step updates the weights."""
        self._ds.step()

    def result(self) -> StepResult:
        """What the step just ended did.

        Raises:
            UserError: too many consecutive steps had a non-finite gradient. DeepSpeed itself skips such steps
                without a word, for ever.
        """
        applied = bool(self._ds.was_step_applied())
        norm = self._ds.get_global_grad_norm()
        self._clear_stale_gradients()
        self._skipped = 0 if applied else self._skipped + 1
        limit = self.config.engine.max_skipped_steps
        if self._skipped >= limit:
            raise UserError(
                f"{limit} steps in a row had a non-finite gradient and were skipped; lower optim.lr, look at the last "
                "records of metrics.jsonl, or use engine.precision=fp32"
            )
        return StepResult(float("nan") if norm is None else float(norm), applied)

    def learning_rates(self) -> dict[str, float]:
        """Of the coming step, per group."""
        return dict(zip(self.group_names, self.scheduler.get_last_lr(), strict=True))

    def _clear_stale_gradients(self) -> None:
        # Under ZeRO-3 a parameter without a gradient in this step would re-apply the one of an earlier step: the flat
        # buffer is never zeroed, nor are the offloaded optimizer's own gradients.
        buffer = getattr(self._ds.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()
            if self.config.engine.offload_optimizer:
                for group in self._ds.optimizer.fp32_partitioned_groups_flat:
                    group.grad.zero_()
