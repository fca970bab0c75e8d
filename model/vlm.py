"""The vision-language model: encoder, connector and language model, whichever connector is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.batch import IGNORE, Batch
from model.config import ModelConfig
from model.connectors import Conditioning, Connector, connector_class, images_of_rows
from model.decoder.cross_attention import looking_at
from model.decoder.injection import compile_forward, pinned
from model.decoder.loss import attach_loss
from model.decoder.norms import resolve_kernels, use_kernels
from model.decoder.packing import Packing, check_packing, packed_mask
from model.generator.placement import Placement, decoder_layers
from model.generator.weights import PerceptualWeights
from model.loading import ModelError, build_llm
from model.vision import VisionEncoder, build_vision


@dataclass
class Output:
    """What a training step needs.

    Attributes:
        loss_sum: Cross-entropy summed over the supervised tokens, nats; scalar, at least fp32.
        n_targets: How many those were.
        weights: The perceptual weights used (connector `vlora`), for logging.
        positions: Positions the decoder computed, padding included.
        tokens: How many of them were tokens, visual ones included; int64 scalar.
    """

    loss_sum: Tensor
    n_targets: int
    weights: PerceptualWeights | None
    positions: int
    tokens: Tensor


@dataclass
class Inputs:
    """What the decoder is given for a batch of R rows with L text tokens at most.

    Attributes:
        keywords: Of the decoder's forward.
        text: int64 [R, L], the flat position in the decoder's output of every text token (of padding: anywhere).
        positions: Positions of that output, padding included.
        tokens: How many of them are tokens, visual ones included; int64 scalar.
    """

    keywords: dict[str, Any]
    text: Tensor
    positions: int
    tokens: Tensor


class VisionLanguageModel(nn.Module):
    """Image and text in, loss or text out.

    The language model's input holds the text only with the connector `vlora`; with `mlp` and `qformer` the visual
    tokens stand at the image's place. Positions count the tokens that are really there, so padding never moves them.

    Args:
        pack_tokens: `LLMConfig.pack_tokens`.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        connector: Connector,
        llm: PreTrainedModel,
        pack_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.connector, self.llm = vision, connector, llm
        self.pack_tokens = pack_tokens
        connector.attach(llm)
        attach_loss(llm)
        if pack_tokens is not None:
            check_packing(llm)

    @property
    def placement(self) -> Placement | None:
        """Where the connector adds deltas to the LLM."""
        return self.connector.placement

    def encode(self, images: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> features [I, P, V]; cached features pass through."""
        if images.dim() != 4:
            return images
        assert self.vision is not None, "pixels for a model whose features are cached"
        return self.vision(images)

    def condition(self, batch: Batch) -> Conditioning:
        """Encode the batch's images and run the connector."""
        # The LLM's dtype is that of everything the engine trains; cached features may have another.
        features = self.encode(batch.images).to(self.llm.dtype)
        return self.connector(features, batch.image_to_sample, batch.image_weight, batch.n_samples)

    def forward(self, batch: Batch) -> Output:
        """Summed loss over the batch's targets.

        Only supervised positions are projected to the vocabulary, a chunk of them at a time (`model.decoder.loss`):
        captions and answers are short, the vocabulary is not. A rank whose rows were all dropped runs the same modules
        for a loss of zero.
        """
        conditioning = self.condition(batch)
        inputs = self.inputs(batch, conditioning, self._packing(batch, conditioning) if self.pack_tokens else None)
        targets = batch.labels[:, 1:]
        supervised = targets != IGNORE
        # A token is predicted where the one before it stands: the last visual token, for what follows an image.
        loss = self.decode(inputs, inputs.text[:, 1:][supervised] - 1, targets[supervised])
        return Output(loss, int(supervised.sum()), conditioning.weights, inputs.positions, inputs.tokens)

    def inputs(self, batch: Batch, conditioning: Conditioning | None, packing: Packing | None = None) -> Inputs:
        """What the decoder is given for a batch.

        Args:
            batch: The text rows.
            conditioning: Of its images; None: text only.
            packing: Lays out the rows without padding; None: as they are.
        """
        mask, order = self._layout(batch, conditioning)
        keywords: dict[str, Any] = {"input_ids": batch.input_ids}
        at = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        if order is not None and conditioning is not None:
            text = self.llm.get_input_embeddings()(batch.input_ids)
            both = torch.cat([conditioning.rows(batch).to(text.dtype), text], dim=1)
            keywords = {"inputs_embeds": both.gather(1, order[..., None].expand(-1, -1, both.shape[2]))}
        tokens, positions = mask.sum(), mask.numel()
        if packing is None:
            # A slot has a position only where no visual token takes its place.
            counted = mask if batch.slots is None or order is not None else mask | batch.slots.long()
            keywords |= {"attention_mask": mask, "position_ids": (counted.cumsum(1) - 1).clamp_min(0)}
        else:
            keywords = {name: packing.pack(value) for name, value in keywords.items()}
            keywords["position_ids"] = packing.position_ids
            if self._one_row:
                keywords |= packing.flash_keywords()
            elif (attention := packed_mask(self.llm, packing.position_ids)) is not None:
                keywords["attention_mask"] = attention
            at, positions = packing.target, packing.source.numel()
        if conditioning is not None and conditioning.weights is not None:
            rows = batch.rows if packing is None else packing.rows(batch.rows)
            keywords["perceptual_weights"] = conditioning.weights.for_rows(rows)
        if conditioning is not None and conditioning.context is not None:
            keywords["visual_context"] = conditioning.context.for_rows(images_of_rows(batch), packing)
        if order is not None:
            at = at.gather(1, order.argsort(1)[:, -batch.input_ids.shape[1] :])
        return Inputs(keywords, at, positions, tokens)

    def decode(self, inputs: Inputs, at: Tensor, targets: Tensor) -> Tensor:
        """Run the decoder, and the head at some of its positions only.

        Args:
            inputs: Of the whole batch.
            at: int64 [T], flat positions of the decoder's output.
            targets: int64 [T], the token that should follow each.

        Returns:
            Summed cross-entropy, a scalar.
        """
        keywords = dict(inputs.keywords)
        if (weights := keywords.get("perceptual_weights")) is not None:
            # Laid out once, before the layers: a compiled layer cannot do it.
            keywords["perceptual_weights"] = weights.for_rows(weights.rows.segments(inputs.text.shape[1], at.device))
        hidden = self.llm.get_decoder()(**keywords, use_cache=False).last_hidden_state
        return self.llm.get_output_embeddings()(hidden.flatten(0, 1)[at], targets)

    def _layout(self, batch: Batch, conditioning: Conditioning | None) -> tuple[Tensor, Tensor | None]:
        """Where the decoder's input holds a token, and the order in which visual tokens and text stand in it."""
        if conditioning is None or conditioning.tokens is None:
            return batch.attention_mask, None
        order, mask = conditioning.layout(batch)
        return mask, order

    @property
    def _one_row(self) -> bool:
        # FlashAttention-2 is told of the segments only where they all stand in one row.
        return self.llm.config._attn_implementation == "flash_attention_2"

    def _packing(self, batch: Batch, conditioning: Conditioning) -> Packing:
        mask, _ = self._layout(batch, conditioning)
        return Packing.of(mask.cpu(), None if self._one_row else self.pack_tokens).to(mask.device)

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of the decoder layers for the backward pass and recompute the rest.

        Non-reentrant: the reentrant form gives the generator zero gradients without a word.

        Raises:
            ModelError: the decoder cannot.
        """
        if not self.llm.supports_gradient_checkpointing:
            raise ModelError(
                f"engine.gradient_checkpointing: {type(self.llm).__name__} cannot recompute its layers; set it to false"
            )
        # Renamed after transformers 5.17, which has the second name only.
        enable = getattr(self.llm, "activation_checkpointing_enable", None) or self.llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, which only the reentrant form needs: a frozen
        # LLM would be run backwards below the first placed layer too, for a gradient that nobody reads.
        self.llm.disable_input_require_grads()

    def compile_layers(self, backend: str = "inductor") -> None:
        """Run the decoder layers through `torch.compile`, deltas included. It compiles during the first steps.

        Layers of one kind share their code: one compilation for layers with deltas and one for those without, then
        another of each for sizes that change from batch to batch. Parameters must be whole (no ZeRO-3).
        """
        # Training, validation and generation are a kind each; past the limit a layer runs uncompiled.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for layer in decoder_layers(self.llm):
            compile_forward(layer, backend=backend)

    @torch.no_grad()
    def generate(
        self, batch: Batch, max_new_tokens: int, pad_token_id: int, answer_end: Sequence[int], **options: Any
    ) -> Tensor:
        """Continuation of left-padded prompts, greedy by default: int64 [R, <= max_new_tokens], padded after the end.

        Args:
            batch: Prompts, with images or without.
            max_new_tokens: Longest continuation, its end included.
            pad_token_id: What follows an answer that ended before others.
            answer_end: Tokens of which any ends an answer: those of the text encoder, not the tokenizer's `eos_token`.
            options: Of transformers' `generate`: sampling (`do_sample=True, temperature=0.7`), `streamer`.
        """
        conditioning = self.condition(batch) if batch.has_image else None
        inputs = self.inputs(batch, conditioning).keywords
        weights, context = inputs.pop("perceptual_weights", None), inputs.pop("visual_context", None)
        # `generate` derives the same positions from the mask; with slots, those of the prompt are given and those of
        # the answer count the slots out again, as in the released code.
        positions = inputs.pop("position_ids")
        prompt = _prompt_positions(self.llm, positions) if batch.slots is not None else nullcontext()
        pin: AbstractContextManager = pinned(self.llm, weights) if weights is not None else nullcontext()
        with pin, prompt, looking_at(self.llm, context):
            out = self.llm.generate(
                **inputs,
                **{"do_sample": False, "use_cache": True} | options,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                eos_token_id=list(answer_end),
            )
        return out if "inputs_embeds" in inputs else out[:, batch.input_ids.shape[1] :]


@contextmanager
def _prompt_positions(llm: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Make the first forward inside the block, that of a prompt, use these positions, int64 [R, L]."""
    given = [positions]

    def hook(module: nn.Module, args: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, keywords | ({"position_ids": given.pop()} if given else {})

    handle = llm.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def build_model(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    meta: bool = False,
    llm_path: str | None = None,
    vision: VisionEncoder | None = None,
) -> VisionLanguageModel:
    """Load the pretrained parts and put a fresh connector between them.

    Args:
        config: What to build.
        dtype: Of all parameters; the statistics that the connector keeps are fp32.
        meta: Shapes only, nothing is read or allocated.
        llm_path: Folder of a finetuned version of the LLM, read in place of `config.llm.path`.
        vision: An encoder whose features are cached: gives the sizes and does not become part of the model.

    Raises:
        ValueError: anything in `config` that does not fit the parts (a `ModelError` where it concerns a path).
    """
    llm = build_llm(config.llm if llm_path is None else replace(config.llm, path=llm_path), dtype, meta)
    encoder = build_vision(config.vision, dtype, meta) if vision is None else None
    with torch.device("meta" if meta else "cpu"):
        model = assemble(config, llm, encoder, vision)
    for parameter in model.connector.parameters():  # not its statistics
        parameter.data = parameter.data.to(dtype)
    if not meta:
        use_kernels(llm, resolve_kernels(config.llm.kernels, torch.cuda.is_available()))
    return model


def assemble(
    config: ModelConfig, llm: PreTrainedModel, vision: VisionEncoder | None, sizes: VisionEncoder | None = None
) -> VisionLanguageModel:
    """Put a fresh connector between the two parts.

    Args:
        config: Its sizes.
        llm: The language model, which is changed to accept perceptual weights.
        vision: The encoder; none: `sizes` is one whose features are cached.
        sizes: See `vision`.
    """
    known = vision if sizes is None else sizes
    if known is None:
        raise ValueError("assemble needs the vision encoder, or one whose features are cached as sizes=")
    connector = connector_class(config).build(config, llm, known.num_patches, known.feature_width)
    return VisionLanguageModel(vision, connector, llm, config.llm.pack_tokens)
