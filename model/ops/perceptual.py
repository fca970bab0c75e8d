"""From the generator's output to the factors of each layer."""

from __future__ import annotations

from torch import Tensor


def split_perceptual(generated: Tensor) -> tuple[Tensor, ...]:
    """The A factors of each group from the generator's output for one type.

    Always this, never `generated[:, g]`: the gradient of an index is a zero tensor of the whole output with one slice
    filled in, once per group, and autograd adds them all up (2 GB, forty times per step at the paper's sizes). The
    gradient of `unbind` writes every slice once.

    Args:
        generated: [S, G, d_in, r], samples by groups.

    Returns:
        G views [S, d_in, r]; no copy is made.

    Raises:
        ValueError: `generated` is not four-dimensional.
    """
    if generated.dim() != 4:
        raise ValueError(f"expected the generator's output as [S, G, d_in, r], got {tuple(generated.shape)}")
    return generated.unbind(1)
