"""FLOPs of a training step, and model FLOPs utilisation (MFU).

2 FLOPs per multiply-add. Counted: every matrix product of the mathematics, on the tokens that are really there; not
counted: padding, recomputation by gradient checkpointing, norms, softmax (the convention of PaLM, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.flops import linear_weights
from model.generator.placement import decoder_layers
from model.vision import VisionEncoder
from model.vlm import VisionLanguageModel

# Dense bf16 peak of the tensor cores, FLOP/s, from NVIDIA's data sheets.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A800": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward, per part."""

    vision: float
    connector: float
    llm: float
    deltas: float

    @property
    def total(self) -> float:
        """All parts."""
        return self.vision + self.connector + self.llm + self.deltas


class FlopCounter:
    """Counts a step from its numbers of tokens; made from the model's own shapes, partitioned or not."""

    def __init__(self, model: VisionLanguageModel, features_cached: bool) -> None:
        llm, config = model.llm, model.llm.config.get_text_config()
        layers = decoder_layers(llm)
        self._linear = [(linear_weights(layer), linear_weights(layer, trained=True)) for layer in layers]
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._attention_width = heads * head_dim
        head = llm.get_output_embeddings()
        self._head = head.in_features * head.out_features
        self._head_trained = head.weight.requires_grad
        self._visual_tokens = model.connector.visual_tokens
        self._first_layer = first_layer_with_a_graph(model)
        self._delta = model.connector.decoder_flops()
        self._vision = 0 if features_cached or model.vision is None else vision_flops(model.vision)
        vision_trained = model.vision is not None and any(p.requires_grad for p in model.vision.parameters())
        self._vision_passes = 3 if vision_trained else 1
        self._connector = model.connector.flops()

    def step(self, rows: int, text_tokens: int, targets: int, images: int) -> StepFlops:
        """FLOPs of one optimizer step over all ranks.

        Args:
            rows: Text rows.
            text_tokens: Their tokens, padding not counted.
            targets: Supervised tokens (only those reach the vocabulary head).
            images: Images (not dummies).
        """
        tokens = text_tokens + self._visual_tokens * rows
        context = tokens / max(1, rows)
        llm = 0.0
        for index, (linear, trained) in enumerate(self._linear):
            attention = 4 * context * self._attention_width * tokens
            llm += 2 * linear * tokens + attention
            if index >= self._first_layer:  # gradients of inputs, and of the weights that are trained
                llm += 2 * (linear + trained) * tokens + 2 * attention
        llm += 2 * self._head * targets * (3 if self._head_trained else 2)
        return StepFlops(
            vision=self._vision_passes * self._vision * images,
            connector=3 * self._connector * images,
            llm=llm,
            deltas=3 * self._delta * tokens,
        )

    def prompt(self, text_tokens: int) -> float:
        """FLOPs of answering one prompt with an image up to its first new token: prefill, and the head once."""
        tokens = text_tokens + self._visual_tokens
        return self.prefill(tokens) + self._connector + self._delta * tokens

    def prefill(self, tokens: int) -> float:
        """FLOPs of the language model alone, deltas left out, for the first new token after so many."""
        linear = 2.0 * sum(linear for linear, _ in self._linear) * tokens
        attention = 4.0 * tokens**2 * self._attention_width * len(self._linear)
        return linear + attention + 2.0 * self._head


def first_layer_with_a_graph(model: VisionLanguageModel) -> int:
    """The first decoder layer that is run backwards: the image changes it, or something in or below it is trained."""
    parts = [model.llm.get_input_embeddings(), *decoder_layers(model.llm)]
    trained = [number for number, part in enumerate(parts) if any(p.requires_grad for p in part.parameters())]
    return min([model.connector.first_layer, *(max(0, number - 1) for number in trained)])


def peak_flops(device: torch.device) -> float | None:
    """Peak of one device in FLOP/s, None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK.items() if key in name), None)


def vision_flops(vision: VisionEncoder, patches: int | None = None) -> float:
    """Of one image; `patches`: of an image of another size, in one pass."""
    encoder = vision.encoder
    config = encoder.config
    patches = (vision.image_size // config.patch_size) ** 2 if patches is None else patches
    tokens = patches + vision.num_prefix
    linear = linear_weights(encoder)
    patchify = 2 * patches * 3 * config.patch_size**2 * config.hidden_size
    return 2 * linear * tokens + 4 * tokens**2 * config.hidden_size * config.num_hidden_layers + patchify
