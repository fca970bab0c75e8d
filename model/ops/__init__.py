"""The low-rank ops: `y = x Wᵀ + s · (x A_b) B` with one A per sample, and merging them into the weights."""

from model.ops.backend import BACKENDS, MERGES, set_backend, set_merge
from model.ops.lowrank import lowrank_delta, lowrank_linear, lowrank_linear_group
from model.ops.merge import MERGEABLE, Merged, MergeError, Placed, merge_, merge_errors, restore_
from model.ops.perceptual import split_perceptual
from model.ops.rows import NO_SAMPLE, Rows, Segments

__all__ = [
    "BACKENDS",
    "MERGEABLE",
    "MERGES",
    "NO_SAMPLE",
    "MergeError",
    "Merged",
    "Placed",
    "Rows",
    "Segments",
    "lowrank_delta",
    "lowrank_linear",
    "lowrank_linear_group",
    "merge_",
    "merge_errors",
    "restore_",
    "set_backend",
    "set_merge",
    "split_perceptual",
]
