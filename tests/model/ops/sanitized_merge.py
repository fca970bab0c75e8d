"""Runs the CUDA merge on CPU threads against float64; `test_cuda_merge.py` starts it under the sanitizers.

python sanitized_merge.py LIBRARY
"""

import ctypes
import sys

import torch

from model.ops.cuda.merge import merge

SHAPES = ((16, 32), (33, 40), (24, 131))  # whole tiles; ragged; odd rows, so that pieces are unaligned
SCALE = 0.25


def check(library: ctypes.CDLL, r: int, cut: int) -> None:
    """Merge all shapes in one launch, each as two pieces cut at `cut` when it is not zero."""
    generator = torch.Generator().manual_seed(r)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    weights, a, b = ([randn(*s) for s in shapes] for shapes in (
        SHAPES, [(d_in, r) for _, d_in in SHAPES], [(r, d_out) for d_out, _ in SHAPES]
    ))  # fmt: skip
    owner, sources, starts = list(range(len(weights))), weights, [0] * len(weights)
    if cut:
        owner = [i for i in owner for _ in range(2)]
        starts = [0, cut] * len(weights)
        sources = [piece.clone() for w in weights for piece in (w.view(-1)[:cut], w.view(-1)[cut:])]
    targets = [torch.full_like(s, float("nan")) for s in sources]
    merge(sources, targets, [a[i] for i in owner], [b[i] for i in owner], SCALE, starts, library=library)
    for i, w in enumerate(weights):
        got = torch.cat([t.reshape(-1) for t, o in zip(targets, owner, strict=True) if o == i]).view(w.shape).double()
        want = w.double() + SCALE * (a[i].double() @ b[i].double()).t()
        error = ((got - want).norm() / want.norm()).item()
        assert error < 2.3e-3, f"r {r}, cut {cut}, shape {tuple(w.shape)}: relative error {error:.2e}"


if __name__ == "__main__":
    for rank, cut in ((16, 0), (8, 0), (7, 101), (40, 64)):
        check(ctypes.CDLL(sys.argv[1]), rank, cut)
    print("ok")
