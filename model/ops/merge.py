"""Folding one sample's perceptual weights into the model's own weights, and taking them out again exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.backend import merge_for
from model.ops.cuda import merge as cuda_merge

WHY_NOT_M = "'m' runs beside the whole MLP, around its nonlinearity, so no change of gate, up or down equals it"
MERGEABLE = ("q", "k", "v", "o", "gate", "up", "down")
"""Types whose update is a change of one weight matrix."""


@dataclass(frozen=True)
class Placed:
    """One projection and its low-rank factors for one sample.

    Attributes:
        kind: Its type, one of `MERGEABLE`.
        weight: [d_out, d_in], the projection's own weight (the Parameter).
        a: [d_in, r].
        b: [r, d_out].
    """

    kind: str
    weight: Tensor
    a: Tensor
    b: Tensor


@dataclass
class Merged:
    """Weights that currently hold a sample's update, with the pristine ones kept beside them.

    Attributes:
        weights: The merged parameters.
        pristine: Their storage from before the merge, in the same order; never written.
    """

    weights: list[Tensor]
    pristine: list[Tensor]


def merge_(placed: Iterable[Placed], scale: float) -> Merged:
    """Point every weight at `W + scale * (A B)ᵀ`; the pristine values stay in memory untouched.

    Accumulated in fp32 (fp64 for fp64 weights) and rounded once. Costs one extra copy of the merged matrices. The
    factors do not become part of a graph. The weights must be whole: under ZeRO-3, export the model first.

    Args:
        placed: The projections; a weight may appear once.
        scale: Alpha / r.

    Returns:
        What `restore_` needs.

    Raises:
        ValueError: a type that is no weight update (`m`), a weight named twice, or shapes that do not fit.
    """
    placed = list(placed)
    _check(placed)
    merged = Merged([p.weight for p in placed], [p.weight.data for p in placed])
    for p, total in zip(placed, merged_weights(merged.pristine, placed, scale), strict=True):
        p.weight.data = total
    return merged


def restore_(merged: Merged) -> None:
    """Point the weights back at their pristine storage: bit-identical, whatever was merged in between."""
    for weight, pristine in zip(merged.weights, merged.pristine, strict=True):
        weight.data = pristine


@torch.no_grad()
def merged_weights(pristine: Sequence[Tensor], placed: Sequence[Placed], scale: float) -> list[Tensor]:
    """`W + scale * (A B)ᵀ` of every projection as new tensors, by what `set_merge` chose.

    A kernel (`cuda`, `triton`) takes all matrices of one device, dtype and rank in one launch.

    `pristine`: the W to start from, [d_out, d_in] each, contiguous.
    """
    totals: list[Tensor] = [torch.empty(0)] * len(placed)
    groups: dict[tuple, list[int]] = {}
    for i, (w, p) in enumerate(zip(pristine, placed, strict=True)):
        groups.setdefault((w.device, w.dtype, p.a.shape[1]), []).append(i)
    for (device, dtype, _), members in groups.items():
        launch = _kernel(merge_for(device, dtype))
        if launch is None:
            for i in members:
                totals[i] = merged_weight(pristine[i], placed[i].a, placed[i].b, scale)
            continue
        for i in members:
            totals[i] = torch.empty_like(pristine[i])
        launch(
            [pristine[i] for i in members],
            [totals[i] for i in members],
            [placed[i].a for i in members],
            [placed[i].b for i in members],
            scale,
        )
    return totals


def _kernel(name: str) -> Callable[..., None] | None:
    """The launcher of a merge; None for torch. Imported only where it runs."""
    if name == "cuda":
        return cuda_merge.merge
    if name == "triton":
        from model.ops.triton.merge import merge

        return merge
    return None


@dataclass(frozen=True)
class MergeError:
    """What rounding to the weight's dtype costs one merged update.

    Attributes:
        kind: Type of the projection.
        norm: `|dW|`, Frobenius.
        size: `|dW| / |W|`.
        error: `|stored update - dW| / |dW|`. About 1.7e-3 / size in bf16: small updates drown.
    """

    kind: str
    norm: float
    size: float
    error: float


@torch.no_grad()
def merge_errors(merged: Merged, placed: Sequence[Placed], scale: float) -> list[MergeError]:
    """The error of each merged weight, in the order of `placed` (as given to `merge_`)."""
    errors = []
    for weight, pristine, p in zip(merged.weights, merged.pristine, placed, strict=True):
        update = (scale * (p.a.double() @ p.b.double())).t()
        stored = weight.double() - pristine.double()
        norm = update.norm()
        error = ((stored - update).norm() / norm).item() if norm > 0 else 0.0
        errors.append(MergeError(p.kind, norm.item(), (norm / pristine.double().norm()).item(), error))
    return errors


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`W + scale * (A B)ᵀ` as a new tensor [d_out, d_in] in the dtype of `weight`; one rounding."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.addmm(weight.to(wide), b.t().to(wide), a.t().to(wide), alpha=scale)
    return total.to(weight.dtype)


def _check(placed: list[Placed]) -> None:
    seen: set[int] = set()
    for p in placed:
        if p.kind == "m":
            raise ValueError(f"type 'm' cannot be merged: {WHY_NOT_M}; run it as a branch (lowrank_delta)")
        if p.kind not in MERGEABLE:
            raise ValueError(f"unknown type {p.kind!r}; mergeable are {', '.join(MERGEABLE)}")
        if p.a.dim() != 2 or p.b.dim() != 2 or p.weight.shape != (p.b.shape[1], p.a.shape[0]):
            raise ValueError(
                f"{p.kind}: weight {tuple(p.weight.shape)} does not fit a {tuple(p.a.shape)} and b {tuple(p.b.shape)} "
                f"(one sample's a is [d_in, r])"
            )
        if id(p.weight) in seen:
            raise ValueError(f"{p.kind}: a weight was named twice in one merge")
        seen.add(id(p.weight))
