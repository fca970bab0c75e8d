"""FLOPs of building blocks, from their shapes alone: 2 per multiply-add, norms and softmax left out."""

from __future__ import annotations

from torch import nn


def linear_weights(module: nn.Module, trained: bool | None = None) -> int:
    """Weights of the linear layers below `module`; read from the layers, for a partitioned weight is empty.

    Args:
        module: Any.
        trained: Those that are trained, or those that are not; None: all.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linears if trained in (None, m.weight.requires_grad))


def blocks_flops(blocks: nn.ModuleList, queries: int, keys: int) -> float:
    """`Block`s: q, k, v, o of both attentions and the feed-forward."""
    if not blocks:
        return 0.0
    block = blocks[0]
    width, ffn = block.linear1.in_features, block.linear1.out_features
    projections = 6 * queries * width**2 + 2 * keys * width**2 + 2 * queries * width * ffn
    attention = 2 * queries * (queries + keys) * width
    return 2.0 * len(blocks) * (projections + attention)
