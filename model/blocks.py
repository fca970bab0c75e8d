"""The transformer block of the generator and of the Q-Former: queries that look at each other, then at the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class CrossAttention(nn.MultiheadAttention):
    """Attention of a few queries to many patches, batch first, without masks or dropout.

    torch projects keys and values in one product, and copies them apart forward and backward. Patches are many and
    queries few, so that these copies were up to a third of a generator's time; two products need none.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """query [I, Q, g], key and value [I, P, g] -> [I, Q, g], no attention weights."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Block(nn.TransformerDecoderLayer):
    """Self-attention, cross-attention, feed-forward; norms (eps 1e-5) in front, no dropout, batch first.

    Parameters are named and initialised as in `nn.TransformerDecoderLayer`, which the released generator is made of.
    """

    def __init__(self, width: int, num_heads: int, ffn_width: int) -> None:
        super().__init__(
            width,
            num_heads,
            ffn_width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.multihead_attn.__class__ = CrossAttention
