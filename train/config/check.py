"""The rules that hold across the keys of a configuration."""

from __future__ import annotations

import importlib.util

from common.errors import ConfigError
from common.settings import shown
from model.config import LoRAConfig
from model.decoder.norms import check_kernels, require_nvidia_apex
from train.config.schema import RunConfig


def validate(config: RunConfig) -> None:
    """Rules that concern more than one key; those that need the model's shapes come when it is built.

    Raises:
        ConfigError: names key, value and what to do.
    """
    _stage(config)
    _data(config)
    _engine(config)
    _packages(config)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _stage(config: RunConfig) -> None:
    """What is trained, how long, and on features of which encoder."""
    stage = config.stage
    _check(
        (stage.steps is None) != (stage.epochs is None),
        f"stage.steps={stage.steps} and stage.epochs={stage.epochs}: give one of the two, the other "
        "null (stage.epochs=null or stage.steps=null)",
    )
    _check(stage.train.connector or stage.train.llm or stage.train.vision, "stage.train: nothing is trained")
    _check(
        stage.train.llm != "lora" or stage.name == "finetune",
        "stage.train.llm=lora adapts the LLM in finetuning, but stage=pretrain keeps it frozen; set "
        "stage.train.llm=false, or stage=finetune init_from=RUN_DIR_OF_THE_PRETRAINING",
    )
    _check(
        stage.train.llm == "lora" or stage.lora == LoRAConfig(),
        f"stage.lora is given, but stage.train.llm={shown(stage.train.llm)} makes no adapters; set "
        "stage.train.llm=lora",
    )
    _check(
        stage.name == "pretrain" or config.init_from is not None,
        "stage=finetune needs init_from=RUN_DIR_OF_THE_PRETRAINING",
    )
    _check(
        not (config.vision.cache and stage.train.vision),
        "vision.cache=true reads features of a frozen encoder, but stage.train.vision=true trains it; set one to false",
    )
    _check(
        not (config.vision.cache and config.vision.image_mode == "tiles"),
        "vision.cache=true keeps one set of features per image, but vision.image_mode=tiles makes several views of it; "
        "set vision.cache=false or another image_mode",
    )


def _data(config: RunConfig) -> None:
    """Text form, batches, validation."""
    official, templates = config.data.compat == "official", {config.data.template, config.data.caption_template}
    _check(
        not official or templates <= {"plain", "vicuna_v1", None},
        f"data.compat=official knows the templates plain and vicuna_v1, but data.template={config.data.template}",
    )
    _check(
        not official or config.llm.pack_tokens is None,
        f"data.compat=official keeps dead positions, which llm.pack_tokens={config.llm.pack_tokens} would take out: "
        "set it to null",
    )
    _check(
        config.data.val is not None or config.evaluation.every is None,
        f"evaluation.every={config.evaluation.every} needs data.val: there is nothing to validate on",
    )
    _check(
        config.data.val is not None or config.checkpoint.export == "last",
        "checkpoint.export=best needs data.val: the best step is that of the lowest validation loss",
    )
    micro, tokens = config.engine.micro_batch_size, config.data.tokens_per_micro_batch
    _check(
        micro is None or micro > config.data.batch_size or config.data.batch_size % micro == 0,
        f"engine.micro_batch_size={micro} does not divide data.batch_size={config.data.batch_size}",
    )
    _check(
        tokens is None or micro is None,
        f"engine.micro_batch_size={micro} and data.tokens_per_micro_batch={tokens}: give one, the other null",
    )
    _check(
        tokens is None or config.engine.zero_stage == 3,
        f"data.tokens_per_micro_batch={tokens}: a changing number of micro-steps needs engine.zero_stage=3",
    )


def _engine(config: RunConfig) -> None:
    """What DeepSpeed and the compiler can do together."""
    engine, optim = config.engine, config.optim
    _check(
        engine.compile is None or engine.zero_stage < 3,
        f"engine.compile={engine.compile} needs engine.zero_stage=2 or less: ZeRO-3 gathers parameters in hooks around "
        "every module, which torch.compile cannot look through",
    )
    _check(
        engine.precision != "bf16" or engine.zero_stage > 0,
        "engine.precision=bf16 adds gradients up in fp32, which DeepSpeed does from engine.zero_stage=1 on; set it, or "
        "engine.precision=fp32",
    )
    _check(
        not (engine.offload_optimizer and optim.name != "deepspeed_cpu_adam"),
        f"engine.offload_optimizer=true needs optim.name=deepspeed_cpu_adam, not {optim.name}",
    )
    _check(
        not (engine.offload_optimizer and engine.zero_stage == 0),
        "engine.offload_optimizer=true needs engine.zero_stage=1 or more",
    )


def _packages(config: RunConfig) -> None:
    """What has to be installed."""
    if config.llm.attn_implementation == "flash_attention_2":
        _check(
            config.engine.precision == "bf16", "llm.attn_implementation=flash_attention_2 needs engine.precision=bf16"
        )
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError(
                "llm.attn_implementation=flash_attention_2: the package flash_attn is not installed; install it on the "
                "GPU machine (pip install flash-attn --no-build-isolation), or set llm.attn_implementation=sdpa"
            )
    check_kernels(config.llm.kernels)
    if config.optim.name == "apex_fused_adam":
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
    if micro is None or micro >= share:
        return 1
    if share % micro:
        raise ConfigError(
            f"data.batch_size={batch} over {world_size} ranks is {share} samples each, "
            f"which engine.micro_batch_size={micro} does not divide"
        )
    return share // micro
