"""The keys that all commands about a trained model share, and what they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from common.errors import ConfigError
from common.settings import setting
from model.config import MovedTo
from vlora.folder import load
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAProcessor


@dataclass
class ModelOptions:
    """Which model, and where.

    Attributes:
        run: Run directory, exported folder or Hugging Face name.
        device: `cpu`, `cuda`, or `auto`: the GPU if there is one.
        dtype: `float32`, `bfloat16`, or `auto`: what it was trained in.
        llm, vision: `llm.path=...`, `vision.path=...`: where those parts are on this machine, if they have moved.
    """

    run: str = "???"
    device: str = "auto"
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))
    llm: MovedTo = field(default_factory=MovedTo)
    vision: MovedTo = field(default_factory=MovedTo)

    def check(self, prefix: str) -> None:
        """A device that is here.

        Raises:
            ConfigError: it is none, or not here.
        """
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"{prefix}device={self.device}: write cpu, cuda, cuda:N or auto")
        gpus = torch.cuda.device_count()
        if self.device.startswith("cuda") and int(self.device.partition(":")[2] or 0) >= gpus:
            raise ConfigError(f"{prefix}device={self.device}: torch sees {gpus or 'no'} GPU{'s' * (gpus > 1)} here")

    def open(self) -> tuple[VLoRAForConditionalGeneration, VLoRAProcessor]:
        """Load the model, without progress bars."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        return load(self.run, dtype=self.dtype, device=self.device, llm=self.llm.path, vision=self.vision.path)


@dataclass
class DecodingOptions(ModelOptions):
    """How answers are decoded.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0: greedy; above: sampling.
        top_p: Sample from the likeliest tokens that together have so much probability.
        seed: Of sampling.
        merge: Fold the images' weights into the language model: it decodes as a plain LLM, and rounding loses a little.
    """

    max_new_tokens: int = setting(256, within="[1, 100000]")
    temperature: float = setting(0.0, within="[0, 10]")
    top_p: float = setting(1.0, within="(0, 1]")
    seed: int = setting(0, within="[0, 4294967295]")
    merge: bool = False

    def generation(self) -> dict[str, Any]:
        """As `generate` takes it; seeds torch."""
        torch.manual_seed(self.seed)
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens} | sampling


def image_files(text: str | None) -> list[Path]:
    """Image files, separated by commas.

    Raises:
        ConfigError: one of them is not there.
    """
    if not text:
        return []
    files = [Path(text)] if Path(text).is_file() else [Path(part.strip()) for part in text.split(",")]
    for file in files:
        if not file.expanduser().is_file():
            raise ConfigError(f"image={file}: no such file")
    return [file.expanduser() for file in files]
