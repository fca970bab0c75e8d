"""Cross-entropy of the language model's head that never holds the logits of all targets.

Logits exist for one chunk of targets at a time: the chunk's loss is added up and its gradient taken at once, in the
forward pass, so that neither logits nor probabilities are kept and nothing is computed twice. What stays until the
backward pass is the gradient of the hidden states [T, d] and, where the head is trained, of its weight [V, d]
(Liger's fused linear cross-entropy, arXiv 2410.10989, section 3.2, does the same on a GPU; see `model.decoder.norms`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.decoder.head import head_transform
from model.decoder.swap import swap

CHUNK_LOGITS = 2**26
"""Logits of a chunk, elements: 256 MiB in fp32, about 2,100 targets of a vocabulary of 32,000. The GEMMs have long
reached their speed there."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight, need_bias = (with_gradients and need for need in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        several = len(targets) > chunk
        # Sums over chunks are kept in fp32: bf16 would round every partial sum.
        d_weight = torch.zeros_like(weight, dtype=precise if several else weight.dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=precise) if need_bias else None
        loss = hidden.new_zeros((), dtype=precise)
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            part_loss, gradient = _chunk(
                hidden[rows],
                weight,
                bias,
                targets[rows, None],
                scale,
                softcap,
                precise,
                need_hidden or need_weight or need_bias,
            )
            loss += part_loss
            if gradient is None:
                continue
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[rows])
            if d_weight is not None and d_weight.dtype == gradient.dtype:
                d_weight.addmm_(gradient.t(), hidden[rows])
            elif d_weight is not None:
                d_weight += gradient.t() @ hidden[rows]
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(*(g for g in (d_hidden, d_weight, d_bias) if g is not None))
        ctx.needed = (need_hidden, need_weight, need_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = (
            (next(saved) * d_loss).to(dtype) if needed else None
            for needed, dtype in zip(ctx.needed, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and its gradient by the head's output [t, V], in `dtype`; targets [t, 1]."""
    logits = nn.functional.linear(hidden, weight, bias).to(dtype)
    if scale != 1:
        logits.mul_(scale)
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if with_gradient else None
        logits.mul_(softcap)
    log_p = torch.log_softmax(logits, 1)
    loss = -log_p.gather(1, targets).sum()
    if not with_gradient:
        return loss, None
    gradient = torch.exp(log_p, out=logits)  # softmax - one-hot, in the logits' place
    gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
    if slope is not None:
        gradient.mul_(slope)
    return loss, gradient if scale == 1 else gradient.mul_(scale)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """Cross-entropy of `softcap * tanh(scale * hidden W^T / softcap)`, summed over targets, nats.

    Args:
        hidden: [T, d], any floating dtype; T may be 0.
        weight: [V, d], with `bias` [V].
        targets: int64 [T]; all of them count.
        scale: Of the head's output (Granite, Cohere).
        softcap: Largest absolute logit (Gemma 2); None: no cap.
        chunk_logits: Logits held at a time, elements (never less than one target's); None: `CHUNK_LOGITS`.

    Returns:
        Scalar in fp32 (fp64 for fp64 input); differentiable once.
    """
    chunk = max(1, (CHUNK_LOGITS if chunk_logits is None else chunk_logits) // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, chunk, torch.is_grad_enabled())


class _LossHead(nn.Module):
    """Mixin in front of the head's class: with targets its forward returns their loss in place of logits.

    `_fused_loss`, set by `model.decoder.norms`, takes the place of `linear_cross_entropy`.

    One call of one module whatever the number of chunks, so that under ZeRO-3 every rank gathers the weight once.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        input_scale, scale, softcap = self._transform
        if input_scale != 1:
            hidden = hidden * input_scale
        # Liger's has no scale.
        if self._fused_loss is not None and len(targets) and scale == 1:
            return self._fused_loss(hidden, self.weight, targets, self.bias, softcap=softcap)
        return linear_cross_entropy(hidden, self.weight, targets, self.bias, scale, softcap)


def attach_loss(llm: PreTrainedModel) -> None:
    """Make `llm`'s head accept `targets`; names, parameters and what it does without targets stay.

    Raises:
        ValueError: a head that is not a plain linear layer, or logits that are not its scaled or capped output.
    """
    head = llm.get_output_embeddings()
    if isinstance(head, _LossHead):
        return
    if type(head) is not nn.Linear:
        raise ValueError(f"the language model's head is a {type(head).__name__}; a plain nn.Linear is needed")
    swap(head, _LossHead, _transform=head_transform(llm), _fused_loss=None)
