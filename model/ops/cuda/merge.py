"""The torch-free CUDA merge (`merge.cu`): building it with nvcc, and calling its C ABI.

No torch header is involved, so it builds where only nvcc is present and loads under any build of torch. With g++ the
same source builds against `cuda_on_cpu.h` and runs on CPU threads, for the sanitizers.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("merge.cu")
ARCHITECTURES = (80, 90)


def build_for_gpu(library: Path, *extra: str) -> str:
    """Compile for the GPUs in `ARCHITECTURES` with the nvcc on the PATH; its messages.

    Raises:
        subprocess.CalledProcessError: nvcc failed; its messages are in `stderr`.
    """
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    return _run("nvcc", "-O3", "-std=c++17", *targets, "-Xcompiler", "-fPIC", "-shared", "-cudart", "static", *extra,
                SOURCE, "-o", library)  # fmt: skip


def build_for_cpu(library: Path, *extra: str) -> str:
    """Compile the same source for CPU threads with g++; its messages. Tests only: slow by design.

    Raises:
        subprocess.CalledProcessError: g++ failed; its messages are in `stderr`.
    """
    return _run(
        "g++", "-O1", "-g", "-std=c++20", "-x", "c++", "-fPIC", "-shared", "-pthread", *extra, SOURCE, "-o", library
    )


def merge(
    library: Path,
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    starts: Sequence[int] | None = None,
) -> None:
    """Write `W + scale * (A B)ᵀ` of every source to its target, bf16, up to 64 matrices or pieces in one launch.

    Args:
        library: What `build_for_gpu` (CUDA tensors) or `build_for_cpu` made.
        sources: Weights [d_out, d_in], or flat pieces [n] with `starts`; contiguous.
        targets: As `sources`.
        a: [d_in, r] each.
        b: [r, d_out] each.
        scale: Alpha / r.
        starts: Flat index of each piece's first element.

    Raises:
        RuntimeError: the launch failed; the code is a `cudaError_t`.
    """
    count, r = len(sources), a[0].shape[1]
    starts = [0] * count if starts is None else list(starts)
    ends = [start + w.numel() for start, w in zip(starts, sources, strict=True)]
    a = [a_p.bfloat16().contiguous() for a_p in a]
    b_t = [b_p.t().bfloat16().contiguous() for b_p in b]

    def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
        return (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))

    stream = torch.cuda.current_stream(sources[0].device).cuda_stream if sources[0].is_cuda else None
    code = ctypes.CDLL(str(library)).vlora_merge_bf16(
        pointers(sources),
        pointers(targets),
        pointers(a),
        pointers(b_t),
        (ctypes.c_int64 * count)(*starts),
        (ctypes.c_int64 * count)(*ends),
        (ctypes.c_int * count)(*(a_p.shape[0] for a_p in a)),
        count,
        r,
        ctypes.c_float(scale),
        ctypes.c_void_p(stream),
    )
    if code != 0:
        raise RuntimeError(f"vlora_merge_bf16 returned {code} for {count} matrices of rank {r}")


def _run(*command: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
