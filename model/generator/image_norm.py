"""Standardisation over images: keeps the generator from emitting the same weights for every image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ImageNorm(nn.Module):
    """Batch normalisation over the images of all ranks, without learned scale or shift.

    Applied to the queries' outputs in front of the head it takes away, by construction, whatever is the same for all
    images. Without it a frozen language model that does not know the answer format first teaches the generator that
    format as one constant delta, a plain LoRA, and the image-dependent part is lost (share of A's energy that varies
    with the image: from 0.8 to 0.001 within ten steps; with it: 1).

    Statistics run over all ranks with a differentiable all-reduce, so one rank and many compute the same gradients
    from the same global micro-batch. In evaluation, and in a micro-batch with fewer than two images, running
    statistics are used.

    Args:
        shape: Shape of one image's entry; every element has its own statistics.
        momentum: Weight of the newest batch in the running statistics.
    """

    def __init__(self, shape: tuple[int, ...], momentum: float = 0.1, eps: float = 1e-4) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Standardise [I, *shape]; images of weight 0 do not count. Statistics in fp32. Collective in training."""
        if not self.training:
            return self._standardised(x, self.mean.float(), self.var.float())
        weight = weight.float().view(-1, *[1] * (x.dim() - 1))
        values = x.float()
        # Sums first: their global values follow from one all-reduce, whatever each rank's number of images.
        count, total = _sum_over_ranks(torch.stack([weight.sum()])), _sum_over_ranks((values * weight).sum(0))
        if count.item() < 2:
            return self._standardised(x, self.mean.float(), self.var.float())
        mean = total / count
        var = _sum_over_ranks(((values - mean).square() * weight).sum(0)) / count
        with torch.no_grad():
            self.batches += 1
            # A plain average at first, so that an early evaluation does not read the initial 0 and 1.
            newest = max(self.momentum, 1 / self.batches.item())
            self.mean.lerp_(mean.to(self.mean.dtype), newest)
            self.var.lerp_(var.to(self.var.dtype), newest)
        return self._standardised(x, mean, var)

    def _standardised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return ((x.float() - mean) * torch.rsqrt(var + self.eps)).to(x.dtype)


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks; its gradient is the sum over ranks of the gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _AllReduce.apply(x)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad
