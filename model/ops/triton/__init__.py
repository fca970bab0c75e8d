"""Triton kernels of the low-rank ops: one file per op, with its kernel, its launcher and its default tile.

Import Triton's own package as usual: this folder is `model.ops.triton`, and absolute imports never confuse the two.

Layouts: x [T, d_in], a_g [S, d_in, r], z [G, T, r], all with contiguous rows; segments as `rows.Segments`. Products
accumulate in fp32 and are rounded once. Up to three projections share a launch, so that x is read once for q, k and v.
"""
