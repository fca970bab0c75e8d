"""Every kernel of the hybrid and fused backends at 7B shapes: bytes, FLOPs, roofline, and on a GPU what it reaches.

`python -m benchmarks.lowrank --predict` prints the arithmetic, `--kernels` (needs a GPU) the measurement.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.ops.rows import Rows

A100_FLOPS, A100_BYTES = 312e12, 2.0e12
"""bf16 tensor-core peak and memory bandwidth (NVIDIA A100 80 GB SXM data sheet)."""


@dataclass(frozen=True)
class Kernel:
    """One launch, or as many of one kind as the projections of a layer's q, k, v need.

    Attributes:
        name: What it computes.
        phase: "base" (the plain linears have it too), "forward", "backward" or "merge".
        bytes: Every operand once, read or written.
        flops: Two per multiply-add.
        run: Launches it and returns the result.
        exact: The same in float64.
    """

    name: str
    phase: str
    bytes: int
    flops: int
    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]

    def roofline(self, flops: float = A100_FLOPS, bandwidth: float = A100_BYTES) -> float:
        """Seconds at the limit: the larger of bytes over bandwidth and FLOPs over peak."""
        return max(self.bytes / bandwidth, self.flops / flops)


def kernels(
    samples: int,
    length: int,
    d: int = 4096,
    r: int = 64,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    matrices: int = 32,
) -> list[Kernel]:
    """All kernels for q, k, v of one layer, `samples` rows of `length` tokens, and the merge of one image.

    On "meta" there is only the arithmetic: nothing is allocated, and Triton is not needed.
    """
    tokens, item = samples * length, dtype.itemsize
    nx, na, nz, nb, nw = (item * n for n in (tokens * d, samples * d * r, tokens * r, r * d, d * d))
    thin, base = 2 * tokens * d * r, 2 * tokens * d * d
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).div(shape[-1] ** 0.5).to(dtype)

    x, dy, w, b = randn(tokens, d), randn(tokens, d), randn(d, d), randn(r, d)
    a, z = list(randn(samples, 8 if device == "cuda" else 3, d, r).unbind(1))[:3], randn(3, tokens, r)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    segments = Rows.padded(range(samples), samples).segments(length, torch.device(device))
    by_sample = (samples, length)

    def wide(t: Tensor, *shape: int) -> Tensor:
        return (t.view(*shape, t.shape[-1]) if shape else t).double()

    def op(name: str) -> Callable:
        """A launcher of `model/ops/triton`, imported when it runs: the arithmetic alone needs no Triton."""
        module = importlib.import_module(f"model.ops.triton.{name.removesuffix('_lowrank')}")
        return getattr(module, name)

    pristine = [randn(d, d) for _ in range(matrices)]
    merged = [torch.empty_like(p) for p in pristine]

    def merge() -> Tensor:
        op("merge")(pristine, merged, [a[0][0]] * matrices, [b] * matrices, 0.5)
        return merged[-1]

    return [
        Kernel("base x Wᵀ (x3)", "base", 3 * (2 * nx + nw), 3 * base,
               lambda: [torch.mm(x, w.t(), out=y) for _ in range(3)][0], lambda: wide(x) @ wide(w).t()),
        Kernel("shrink q,k,v", "forward", nx + 3 * na + 3 * nz, 3 * thin,
               lambda: op("shrink")(x, a, 0.5, segments),
               lambda: torch.stack([(0.5 * wide(x, *by_sample) @ wide(a_g)).view(tokens, r) for a_g in a])),
        Kernel("z B into y (x3)", "forward", 3 * (nz + nb + nx), 3 * thin,
               lambda: [torch.mm(z_g, b, out=y) for z_g in z][2], lambda: wide(z[2]) @ wide(b)),
        Kernel("x Wᵀ + z B, fused (x3)", "fused", 3 * (2 * nx + nw + nz + nb), 3 * (base + thin),
               lambda: [op("gemm_lowrank")(x, w, z_g, b) for z_g in z][2],
               lambda: wide(x) @ wide(w).t() + wide(z[2]) @ wide(b)),
        Kernel("base dy W (x3)", "base", 3 * (2 * nx + nw), 3 * base,
               lambda: [torch.mm(dy, w, out=dx) for _ in range(3)][0], lambda: wide(dy) @ wide(w)),
        Kernel("dz = dy Bᵀ (x3)", "backward", 3 * (nx + nb + nz), 3 * thin,
               lambda: [torch.mm(dy, b.t()) for _ in range(3)][0], lambda: wide(dy) @ wide(b).t()),
        Kernel("dB = zᵀ dy (x3)", "backward", 3 * (nx + nz + nb), 3 * thin,
               lambda: [torch.mm(z_g.t(), dy) for z_g in z][2], lambda: wide(z[2]).t() @ wide(dy)),
        Kernel("expand dz Aᵀ into dx", "backward", 3 * nz + 3 * na + nx, 3 * thin,
               lambda: op("expand")(z, a, segments),
               lambda: sum(wide(z[g], *by_sample) @ wide(a[g]).mT for g in range(3)).view(tokens, d)),
        Kernel("factor_grad q,k,v", "backward", nx + 3 * nz + 3 * na, 3 * thin,
               lambda: op("factor_grad")(x, z, segments),
               lambda: torch.stack([wide(x, *by_sample).mT @ wide(z_g, *by_sample) for z_g in z])),
        Kernel(f"merge {matrices} matrices", "merge", matrices * (2 * nw + 2 * nb), matrices * 2 * d * d * r,
               merge, lambda: wide(pristine[-1]) + 0.5 * (wide(a[0][0]) @ wide(b)).t()),
    ]  # fmt: skip


def predict(samples: int, length: int, **shape: Any) -> dict[str, dict]:
    """Ratios first: low-rank roofline time over that of the same base linears; then every kernel's arithmetic."""
    rows = kernels(samples, length, **shape)
    total = {phase: sum(k.roofline() for k in rows if k.phase == phase) for phase in {k.phase for k in rows}}
    return {
        "overhead": {
            "forward": total["forward"] / (total["base"] / 2),
            "forward + backward": (total["forward"] + total["backward"]) / total["base"],
        },
        "kernels": {k.name: {"bytes": k.bytes, "flops": k.flops, "roofline_us": 1e6 * k.roofline()} for k in rows},
    }


def measure(samples: int, length: int, bench: Callable[[Callable], float], **shape: Any) -> dict[str, dict]:
    """What every kernel reaches on this GPU, against its own copy bandwidth and cuBLAS rate.

    Args:
        samples, length, shape: As for `kernels`.
        bench: Milliseconds of a callable (`triton.testing.do_bench`).
    """
    rows = kernels(samples, length, **shape)
    source = torch.empty(2**28, dtype=torch.uint8, device=shape["device"])
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / (1e-3 * bench(lambda: target.copy_(source)))
    base = rows[0]
    rate = base.flops / (1e-3 * bench(base.run))
    found = {"device": {"copy_bytes_per_s": bandwidth, "cublas_flops": rate}}
    for k in rows:
        taken, got, want = 1e-3 * bench(k.run), k.run().double(), k.exact()
        found[k.name] = {
            "us": 1e6 * taken,
            "tflops": k.flops / taken / 1e12,
            "gb_per_s": k.bytes / taken / 1e9,
            "share_of_roofline": k.roofline(rate, bandwidth) / taken,
            "share_of_cublas": k.flops / taken / rate,
            "error": ((got - want).norm() / want.norm()).item(),
        }
    return found
