"""The vision encoder: any Hugging Face CLIP, SigLIP or DINOv2, read at a chosen hidden layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel

from model.config import VisionConfig
from model.loading import load_pretrained


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
        self.image_size = config.image_size or hf.image_size
        if self.image_size % hf.patch_size:
            raise ValueError(f"vision.image_size={self.image_size} is not a multiple of the patch size {hf.patch_size}")
        if not -hf.num_hidden_layers - 1 <= config.layer <= -1:
            raise ValueError(f"vision.layer={config.layer}: count from the end, -1 to -{hf.num_hidden_layers + 1}")
        if config.final_norm and config.layer != -1:
            raise ValueError("vision.final_norm=true only makes sense with vision.layer=-1")
        # SigLIP has no class token; DINOv2 with registers has more than one prefix token.
        self.num_prefix = 0 if "siglip" in hf.model_type else 1 + getattr(hf, "num_register_tokens", 0)
        patches = (self.image_size // hf.patch_size) ** 2
        self.num_patches = patches + (self.num_prefix if config.keep_cls else 0)
        self.feature_width = hf.hidden_size
        # CLIP and SigLIP interpolate their positions when asked to; DINOv2 always does and takes no such option.
        asks = self.image_size != hf.image_size and not hf.model_type.startswith("dinov2")
        self._options = {"interpolate_pos_encoding": True} if asks else {}

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
