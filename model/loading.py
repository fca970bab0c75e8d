"""Loads the pretrained parts with errors a user can act on; builds them on the meta device without their weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model.config import LLMConfig, ModelConfig
from model.pretrained import ModelError, fetch_hint, find_source, weight_files

_SAMPLE = 64 * 1024  # bytes
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def architecture_config(architecture: dict[str, Any]) -> PreTrainedConfig:
    """The Hugging Face config of `llm.architecture` / `vision.architecture`."""
    fields = dict(architecture)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def pretrained_config(
    what: str, path: str, architecture: dict[str, Any] | None, meta: bool = False
) -> PreTrainedConfig:
    """The config of a pretrained part; of a two-tower model (CLIP, SigLIP) its vision half when `what` is vision.

    With `meta`, a given `architecture` is enough where `path` is no folder. Nothing is ever downloaded (`train.fetch`
    does that).

    Raises:
        ModelError: nothing at `path`, or another architecture than the one described.
    """
    if meta and architecture is not None and not Path(path).expanduser().is_dir():
        return architecture_config(architecture)
    folder = _folder(what, path)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}.path={path}: its config.json cannot be read ({_first_line(error)})") from error
    if what == "vision":
        config = getattr(config, "vision_config", config)
    for key, expected in (architecture or {}).items():
        if getattr(config, key, None) != expected:
            raise ModelError(
                f"{what}.path={path} has {key}={getattr(config, key, None)}, but {what}.architecture expects {expected}"
            )
    return config


def load_pretrained(
    auto_class: Any,
    what: str,
    path: str,
    architecture: dict[str, Any] | None,
    dtype: torch.dtype,
    *,
    meta: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, or its shapes only when `meta`.

    Args:
        auto_class: A transformers Auto class.
        what: `llm` or `vision`, for messages.
        options: Passed on (for example `attn_implementation`).

    Raises:
        ModelError: see `pretrained_config`; also weights that leave parameters of the model unset.
    """
    config = pretrained_config(what, path, architecture, meta)
    if meta:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype, **options)
    folder = _folder(what, path)
    weight_files(what, folder)
    try:
        model, info = auto_class.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: other shapes than the configuration's
        raise ModelError(f"{what}.path={path}: weights cannot be read ({_first_line(error)})") from error
    if missing := sorted(k for k in info["missing_keys"] if not k.endswith("mask_token")):
        raise ModelError(f"{what}.path={path}: weights lack {len(missing)} tensors, first {missing[0]}; wrong model?")
    return model


def build_llm(config: LLMConfig, dtype: torch.dtype, meta: bool = False) -> PreTrainedModel:
    """The causal language model, caching off (training) and sampling defaults removed (evaluation is greedy)."""
    attention = config.attn_implementation
    if meta and attention == "flash_attention_2":  # shapes do not depend on it, and its package may be elsewhere
        attention = "sdpa"
    try:
        llm = load_pretrained(
            AutoModelForCausalLM,
            "llm",
            config.path,
            config.architecture,
            dtype,
            meta=meta,
            attn_implementation=attention,
        )
    except ValueError as error:
        if found := re.match(r"(\w+) does not support (?:an attention implementation|Flash Attention)", str(error)):
            raise ModelError(
                f"llm.attn_implementation={attention}: {found[1]} does not have it; set llm.attn_implementation=eager"
            ) from error
        raise
    llm.config.use_cache = False
    llm.generation_config.do_sample = False
    llm.generation_config.temperature = llm.generation_config.top_p = llm.generation_config.top_k = None
    return llm


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the language model at `path`.

    Raises:
        ModelError: no tokenizer there, one that cannot be read, or one with more tokens than the model has embeddings.
    """
    folder = _folder("llm", path)
    needed = (
        f"llm.path={path}: its tokenizer cannot be read (%s); it needs tokenizer.json, or tokenizer.model, and "
        "tokenizer_config.json as they were published"
    )
    if not any(file for pattern in _TOKENIZERS for file in folder.glob(pattern)):
        raise ModelError(needed % "no vocabulary there")  # transformers would make an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the tokenizer libraries make of a damaged file
        raise ModelError(needed % _first_line(error)) from error
    if (folder / "config.json").is_file():
        rows = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "vocab_size", None)
        beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if rows is not None and i >= rows)
        if beyond:
            # On a GPU it would be a failed assertion deep in a kernel, once a row holds the token or is padded with it.
            raise ModelError(
                f"llm.path={path}: the tokenizer has {len(beyond)} tokens beyond the model's {rows} embeddings, first "
                f"{beyond[0][1]!r} with id {beyond[0][0]}; take the added tokens out, or give the model embeddings for "
                "them (resize_token_embeddings, save_pretrained)"
            )
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def part_fingerprints(config: ModelConfig) -> dict[str, str]:
    """`fingerprint` of the LLM and of the vision encoder, by `llm` and `vision`: what a connector belongs to."""
    return {"llm": fingerprint(config.llm.path), "vision": fingerprint(config.vision.path)}


def fingerprint(path: str) -> str:
    """Identity of a pretrained model: 16 hex digits over its shapes, dtypes and a sample of its weights.

    Reads the safetensors headers and 64 KiB from both ends and the middle of every file, so that 13 GB take
    milliseconds; the config's own text is left out, because tools rewrite it.

    Raises:
        ModelError: no safetensors weights at `path`.
    """
    folder = _folder("weights", path)
    names = weight_files("weights", folder)
    if not names[0].endswith(".safetensors"):
        raise ModelError(f"{path} ships {names[0]}, which is turned into safetensors once; {fetch_hint('llm', path)}")
    files = [folder / name for name in names]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(size.to_bytes(8, "little") + stream.read(header))
            for offset in (8 + header, size // 2, max(0, size - _SAMPLE)):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _folder(what: str, path: str) -> Path:
    """Where a model's files are; a hub name means Hugging Face's own cache."""
    source = find_source(what, path)
    if source is None:
        raise ModelError(f"{what}.path={path} is not on this machine; {fetch_hint(what, path)}")
    return source
