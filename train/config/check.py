"""The rules that hold across the keys of a configuration."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

from common.errors import ConfigError
from model.config import ATTENTION, KERNELS, parse_types
from model.decoder.norms import check_kernels, require_nvidia_apex
from model.ops import BACKENDS, MERGES
from train.config.schema import OPTIMIZERS, STAGES, RunConfig


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
    one_of("ops.merge", config.ops.merge, MERGES)
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
