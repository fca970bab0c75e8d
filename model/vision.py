"""The vision encoder: any plain vision transformer of transformers (docs/models.md), read at a chosen hidden layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from model.config import VisionConfig
from model.loading import ModelError, load_pretrained

# Tokens before those of the patches, registers aside: a class token, where nothing else is known.
_PREFIX = {"siglip": 0, "ijepa": 0, "aimv2": 0, "deit": 2}


def image_size(config: VisionConfig, hf: Any) -> int:
    """Side of the square images that an encoder is given: the one asked for, or that of its positions."""
    return config.image_size or hf.image_size


class VisionEncoder(nn.Module):
    """pixels [I, 3, H, W] -> features [I, P, V].

    Attributes:
        num_patches: P, class token and registers counted when they are kept.
        feature_width: V.
        image_size: Side of the square input, pixels.
    """

    def __init__(self, encoder: nn.Module, config: VisionConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer, self.final_norm, self.keep_cls = config.layer, config.final_norm, config.keep_cls
        hf = encoder.config
        if getattr(encoder, "use_head", False):
            # SigLIP's pooling head: nobody reads its result, so it is neither run nor kept.
            encoder.use_head, encoder.head, hf.vision_use_head = False, None, False
        if "siglip2" in hf.model_type or not hasattr(hf, "image_size"):
            raise ModelError(
                f"vision.path={config.path}: {hf.model_type} has no fixed image size (SigLIP 2 NaFlex is such a one); "
                "take an encoder of square images, such as the fixed-resolution SigLIP 2 checkpoints"
            )
        if not hasattr(hf, "hidden_size") or not isinstance(getattr(hf, "patch_size", None), int):
            raise ModelError(
                f"vision.path={config.path}: {hf.model_type} is not a plain vision transformer (one width, square "
                "patches); docs/models.md lists encoders that work"
            )
        self.image_size = image_size(config, hf)
        if self.image_size % hf.patch_size:
            raise ValueError(f"vision.image_size={self.image_size} is not a multiple of the patch size {hf.patch_size}")
        if not -hf.num_hidden_layers - 1 <= config.layer <= -1:
            raise ValueError(f"vision.layer={config.layer}: count from the end, -1 to -{hf.num_hidden_layers + 1}")
        if config.final_norm and config.layer != -1:
            raise ValueError("vision.final_norm=true only makes sense with vision.layer=-1")
        own = next((n for kind, n in _PREFIX.items() if hf.model_type.startswith(kind)), 1)
        self.num_prefix = own + getattr(hf, "num_register_tokens", 0)
        patches = (self.image_size // hf.patch_size) ** 2
        self.num_patches = patches + (self.num_prefix if config.keep_cls else 0)
        self.feature_width = hf.hidden_size
        # CLIP and SigLIP interpolate their positions when asked to; who takes no such option always does, or cannot.
        asks = self.image_size != hf.image_size
        takes = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if asks and takes else {}
        if next(encoder.parameters()).is_meta:  # the front end's look at the shapes, before anything is started
            self._check_tokens(self.num_prefix + patches, config.path)

    def _check_tokens(self, expected: int, path: str) -> None:
        """Raise a `ModelError` when the encoder returns another number of tokens than its kind should."""
        with torch.no_grad():
            blank = torch.empty(1, 3, self.image_size, self.image_size, device="meta", dtype=self.encoder.dtype)
            try:
                tokens = self.encoder(pixel_values=blank, **self._options).last_hidden_state.shape[1]
            except (RuntimeError, ValueError) as error:
                raise ModelError(
                    f"vision.path={path}: {self.encoder.config.model_type} takes no image of {self.image_size} pixels "
                    f"({str(error).splitlines()[0]}); set vision.image_size={self.encoder.config.image_size}"
                ) from error
        if tokens != expected:
            raise ModelError(
                f"vision.path={path}: {self.encoder.config.model_type} returns {tokens} tokens for an image of "
                f"{self.image_size} pixels, {expected} were expected; docs/models.md lists encoders that work"
            )

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode while it is frozen."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of the chosen layer; without a graph when nothing in the encoder is trained."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trained):
            out = self.encoder(pixel_values=pixels, output_hidden_states=True, **self._options)
            hidden = out.last_hidden_state if self.final_norm else out.hidden_states[self.layer]
            return hidden if self.keep_cls else hidden[:, self.num_prefix :]


def build_vision(config: VisionConfig, dtype: torch.dtype, meta: bool = False) -> VisionEncoder:
    """Load the encoder (or, with `meta`, only its shapes).

    Raises:
        ValueError: weights that do not fit `config.architecture`, or options the encoder does not have.
        FileNotFoundError: no such model.
    """
    encoder = load_pretrained(AutoModel, "vision", config.path, config.architecture, dtype, meta=meta)
    return VisionEncoder(encoder, config)
