"""What can be chosen about the model. Plain dataclasses: `train.config` composes them, `model` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.errors import ConfigError
from common.settings import setting

WEIGHT_TYPES = ("q", "k", "v", "o", "gate", "up", "down", "m")
"""Projections a delta can be added to; `m` is the released code's path parallel to the whole MLP."""

ATTENTION = ("eager", "sdpa", "flash_attention_2")
KERNELS = ("auto", "transformers", "torch", "liger", "apex")
IMAGE_MODES = ("crop", "resize", "pad", "tiles")
TRANSPARENT = ("white", "mean", "drop")
INITIALISATIONS = ("paper", "stable")
BACKENDS = ("auto", "reference", "cpu", "hybrid", "fused")
MERGES = ("auto", "cuda", "triton", "torch")


@dataclass
class LLMConfig:
    """The language model.

    Attributes:
        path: Hugging Face name or local folder.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2` (GPU, bf16, needs the package flash_attn), as
            transformers names them.
        kernels: RMSNorm, rotary embedding and loss: `transformers` (its own modules), `torch` (`rms_norm`, one kernel
            on a GPU), `liger` (all three, GPU), `apex` (NVIDIA's norm, GPU), or `auto`: on a GPU the first that is
            installed of liger, apex, torch; on a CPU transformers.
        architecture: The Hugging Face config of the expected model, as a dictionary with `model_type`. Lets the model
            be built on the meta device without its weights; weights of another shape are refused.
        pack_tokens: Train without padding: the dialogues of a micro-batch stand end to end in rows of at most so many
            tokens (one row with `flash_attention_2`), each seeing only itself; null: one padded row per dialogue.
    """

    path: str = setting("???", path=True)
    attn_implementation: str = setting("sdpa", choices=ATTENTION)
    kernels: str = setting("auto", choices=KERNELS)
    pack_tokens: int | None = setting(None, within="[1, 1048576]")
    architecture: dict[str, Any] | None = None

    def check(self, prefix: str) -> None:
        """An architecture names its kind.

        Raises:
            ConfigError: it does not.
        """
        _check_architecture(f"{prefix}architecture", self.architecture)


@dataclass
class VisionConfig:
    """The vision encoder (CLIP, SigLIP, DINO, ...: docs/models.md lists those that work).

    Attributes:
        path: Hugging Face name or local folder.
        layer: Which of `hidden_states` is read: -1 is the last block's output before the final norm, -2 (LLaVA,
            VLoRA) the one before it.
        final_norm: Read `last_hidden_state` instead, with the final norm where the encoder applies one (`layer: -1`).
        keep_cls: Keep the class token (and DINOv2's registers) in front of the patches.
        image_size: Side of the square input, pixels; null: what the encoder was trained with.
        image_mode: `resize` (distort to the square), `crop` (shortest edge, centre crop), `pad` (pad to a square with
            the encoder's mean colour, then resize) or `tiles` (any resolution: the image as `resize` makes it and the
            tiles of the grid that suits it best, each an image of the sample).
        max_tiles: Most tiles of an image in mode `tiles`, the whole image not counted.
        transparent: What shows through transparent pixels: `white`, the `mean` colour of the encoder, or `drop`, the
            colour stored under them (CLIP's processor).
        cache: Compute the frozen encoder's features once per image and read them from disk.
        architecture: As in `LLMConfig`.
    """

    path: str = setting("???", path=True)
    layer: int = setting(-2, within="[-1000, -1]")
    final_norm: bool = False
    keep_cls: bool = False
    image_size: int | None = setting(None, within="[1, 8192]")
    image_mode: str = setting("crop", choices=IMAGE_MODES)
    max_tiles: int = setting(4, within="[2, 64]")
    transparent: str = setting("white", choices=TRANSPARENT)
    cache: bool = False
    architecture: dict[str, Any] | None = None

    def check(self, prefix: str) -> None:
        """An architecture names its kind.

        Raises:
            ConfigError: it does not.
        """
        _check_architecture(f"{prefix}architecture", self.architecture)


@dataclass
class GeneratorConfig:
    """The perceptual weights generator (paper, Figure 3; sizes of the released code).

    Attributes:
        num_blocks: Decoder blocks N (paper Table 5).
        width: Width g of the queries.
        num_heads: Attention heads.
        ffn_ratio: Width of the feed-forward over `width`.
        rank: Rank r of every delta (paper Table 4).
        alpha: Deltas are scaled by alpha / rank; null: alpha = rank.
        types: Which projections get a delta (paper Table 3); a string of one-letter types or a list.
        every: Place deltas in every n-th layer: layers n-1, 2n-1, ... (0-based).
        above: Of these only the ones above this share of the LLM's depth: 0.5 leaves the lower half as it is.
        layers: The placed layers by 0-based index, in place of `every` and `above`; null: every n-th.
        shared: One stack of blocks for all types in place of one per type.
        image_norm: Standardise the queries' outputs over images, so that A cannot become the same for every image.
        init: `paper` (exactly as released) or `stable` (small queries, normalised keys, head scaled to its input).
    """

    num_blocks: int = setting(8, within="[1, 1000]")
    width: int = setting(512, within="[1, 65536]")
    num_heads: int = setting(16, within="[1, 1024]")
    ffn_ratio: float = setting(4.0, within="(0, 64]")
    rank: int = setting(64, within="[1, 65536]")
    alpha: float | None = setting(None, within="(0, 1e6]")
    types: Any = "qkvom"
    every: int | None = setting(4, within="[1, 1000]")
    above: float = setting(0.0, within="[0, 1)")
    layers: list[int] | None = setting(None, within="[0, 9999]")
    shared: bool = False
    image_norm: bool = False
    init: str = setting("stable", choices=INITIALISATIONS)

    def check(self, prefix: str) -> None:
        """The types, and a way to place the layers.

        Raises:
            ConfigError: an unknown type, or none of `every` and `layers`.
        """
        parse_types(self.types)
        if self.every is None and self.layers is None:
            raise ConfigError(f"{prefix}every=null and {prefix}layers=null: give one of the two")


@dataclass
class LoRAConfig:
    """Low-rank adapters of the LLM (`stage.train.llm=lora`): W x + (alpha / rank) B A x, made by the library peft.

    Attributes:
        rank: Of every adapter.
        alpha: Adapters are scaled by alpha / rank; null: alpha = rank.
        dropout: Of an adapter's input, in training.
        types: Which projections are adapted, as in `generator.types` but without `m`; null: every linear layer of the
            decoder layers. Those that `stage.freeze` and `stage.freeze_lower` keep are not.
    """

    rank: int = setting(16, within="[1, 65536]")
    alpha: float | None = setting(None, within="(0, 1e6]")
    dropout: float = setting(0.0, within="[0, 1)")
    types: Any = None

    def check(self, prefix: str) -> None:
        """The types.

        Raises:
            ConfigError: an unknown type, or `m`, which is no projection.
        """
        if self.types is not None and "m" in parse_types(self.types, f"{prefix}types"):
            raise ConfigError(f"{prefix}types={self.types}: m is no projection of the LLM, so it has no adapter")


def _connectors() -> tuple[str, ...]:
    from model.connectors import CONNECTORS  # late: it reads this module

    return tuple(CONNECTORS)


@dataclass
class ConnectorConfig:
    """How the image reaches the language model.

    Attributes:
        name: `vlora` (through its weights), `mlp` (LLaVA-v1.5: two-layer projector, visual tokens in the input),
            `qformer` (learned queries, visual tokens in the input) or `crossattn` (gated cross-attention in the layers
            that `generator.every` or `generator.layers` names, no visual token in the input).
        normalize_features: Standardise each feature channel with the mean and deviation over the training images;
            null: only when the generator's init is `stable`.
        num_queries: Visual tokens of the `qformer`.
        num_blocks: Blocks of the `qformer`.
        num_heads: Heads of the `qformer`.
    """

    name: str = setting("vlora", choices=_connectors)
    normalize_features: bool | None = None
    num_queries: int = setting(32, within="[1, 65536]")
    num_blocks: int = setting(2, within="[1, 1000]")
    num_heads: int = setting(8, within="[1, 1024]")


@dataclass
class OpsConfig:
    """The low-rank ops of a run, in training and in evaluation (docs/kernels.md).

    Attributes:
        backend: `auto` (hybrid on CUDA, cpu elsewhere), `reference` (plain differentiable torch), `cpu` (plain torch,
            accumulating in place), `hybrid` (Triton around cuBLAS) or `fused` (Triton base GEMM where the tuner has
            measured it to pay, else as hybrid).
        merge: What folds one image's weights into the LLM: `auto` (`cuda` where it has been built, else `triton`, on
            the CPU `torch`), `cuda` (CUDA C++, bf16; `python -m model.ops.cuda.build`), `triton` or `torch`.
    """

    backend: str = setting("auto", choices=BACKENDS)
    merge: str = setting("auto", choices=MERGES)


@dataclass
class MovedTo:
    """Where a part of a trained model is on this machine.

    Attributes:
        path: Folder or name; null: where it was in training. It must be the same model, which its fingerprint tells.
    """

    path: str | None = setting(None, path=True)


@dataclass
class ModelConfig:
    """Everything `model.build` needs."""

    llm: LLMConfig = field(default_factory=LLMConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)


def parse_types(types: str | list[str], key: str = "generator.types") -> tuple[str, ...]:
    """`"qkvom"`, `"q,k,gate"` or a list -> a tuple of types in the order given.

    Args:
        types: The value of a key.
        key: Its name, for messages.

    Raises:
        ConfigError: an unknown or repeated type, or no text.
    """
    words = (
        types if not isinstance(types, str) else types.split(",") if "," in types or types in WEIGHT_TYPES else types
    )
    names = [str(word).strip() for word in words] if isinstance(words, str | list | tuple) else [str(types)]
    for name in names:
        if name not in WEIGHT_TYPES:
            raise ConfigError(
                f"{key}={types}: unknown type {name!r}; known: {', '.join(WEIGHT_TYPES)} "
                "(one letter each as in 'qkvom', or separated by commas as in 'q,k,gate')"
            )
    if len(set(names)) != len(names) or not names:
        raise ConfigError(f"{key}={types}: empty, or names a type twice")
    return tuple(names)


def _check_architecture(name: str, architecture: dict[str, Any] | None) -> None:
    if architecture is not None and not isinstance(architecture.get("model_type"), str):
        raise ConfigError(f"{name}={architecture}: needs model_type, as in the model's config.json")
