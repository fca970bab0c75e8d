"""The prepared splits and text encoders that a configuration names."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_prep.store.manifest import MANIFEST
from data_prep.store.split import Split
from data_prep.text.encoder import TextEncoder
from train.data.collate import Text
from train.data.config import DataConfig


def open_split(config: DataConfig, path: str, whole: bool = True) -> Split:
    """A split named in the configuration; `whole` as in `Split`.

    Raises:
        DataError: it is not prepared or not whole.
    """
    return Split(Path(config.root) / path, whole)


def is_prepared(config: DataConfig, path: str) -> bool:
    """Whether a split named in the configuration is on this machine."""
    return (Path(config.root) / path / MANIFEST).is_file()


def open_train_split(config: DataConfig, path: str) -> Split:
    """A split to train on: whole, unless `data.on_corrupt_shard` says that it may lose shards.

    Raises:
        DataError: it is not prepared or not whole.
    """
    return open_split(config, path, config.on_corrupt_shard == "fail")


def make_text(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Text encoders of the configuration.

    Raises:
        DataError: a template that does not go with the tokenizer.
    """
    caption = config.caption_template
    return Text(
        TextEncoder(tokenizer, config.template, config.max_length, config.compat == "official"),
        TextEncoder(tokenizer, caption, config.max_length, config.compat == "official") if caption else None,
        config.on_too_long,
    )
