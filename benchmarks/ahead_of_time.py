"""Compile the Triton kernels for real GPUs on a machine without one, and read what the compiler did.

    python -m benchmarks.ahead_of_time [--write]

prints registers, spills, shared memory and instruction counts of every kernel at 7B shapes for sm_80 and sm_90;
`--write` replaces the part of this Triton in the committed table (`benchmarks/kernel_resources.json`), which a test
regenerates and compares.

The launchers run unchanged on meta tensors of the real shapes: a driver that names the target GPU stands in for the
CUDA driver, and a launch only compiles, so that block sizes and specialisation (divisibility by 16, strides of one) are
those of a real launch. This shows resources, not speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from model.ops.rows import Segments
from model.ops.triton import expand, factor_grad, gemm, merge, shrink

TABLE = Path(__file__).with_name("kernel_resources.json")
TARGETS = (80, 90)
SHARED_MEMORY = {80: 167936, 90: 233472}
"""Bytes of shared memory of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NamedTarget:
    """The part of a Triton driver that compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """See `triton.backends.driver`, as for the others."""
        return self.target

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Nothing is allocated."""
        return torch.device("meta")


@contextmanager
def compiling_for(capability: int) -> Iterator[list[CompiledKernel]]:
    """Inside the block a launch compiles for `capability` and appends the kernel to the list, and runs nothing."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self, *args, warmup=False, **kwargs):
        kernel = run(self, *args, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver.set_active(NamedTarget(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        for module in (shrink, expand, factor_grad, gemm, merge):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def launches(samples: int = 96, length: int = 64, d: int = 4096, r: int = 64) -> dict[str, Callable[[], object]]:
    """Every launch of the hybrid and fused backends and of merging, at the shapes of pretraining a 7B model."""
    tokens = samples * length

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index = [meta(n, dtype=torch.int32) for n in (samples + 1, samples, samples, samples + 1)]
    segments = Segments.of(index, length, length, tokens)
    x, w, b = meta(tokens, d), meta(d, d), meta(r, d)
    a = list(meta(samples, 8, d, r).unbind(1))[:3]  # strided, as split_perceptual hands them out
    z = meta(3, tokens, r)
    fused: dict[str, dict[str, Any]] = {
        "128x128x32": {},
        "128x256x32": {"BLOCK_N": 256, "num_warps": 8},
    }
    found: dict[str, Callable[[], object]] = {
        "shrink q,k,v": lambda: shrink.shrink(x, a, 0.5, segments),
        "shrink o": lambda: shrink.shrink(x, a[:1], 0.5, segments),
        "expand q,k,v": lambda: expand.expand(z, a, segments),
        "expand o": lambda: expand.expand(z[:1], a[:1], segments),
        "factor_grad q,k,v": lambda: factor_grad.factor_grad(x, z, segments),
        "factor_grad o": lambda: factor_grad.factor_grad(x, z[:1], segments),
    }
    for name, tile in fused.items():
        found[f"gemm_lowrank forward {name}"] = partial(gemm.gemm_lowrank, x, w, z[0], b, **tile)
        found[f"gemm_lowrank dx {name}"] = partial(
            gemm.gemm_lowrank, x, w.t(), z[0], a[0].transpose(1, 2), segments, **tile
        )
    matrices = [meta(d, d) for _ in range(32)]
    found["merge 32 matrices"] = lambda: merge.merge(matrices, matrices, [meta(d, r)] * 32, [b] * 32, 0.5)
    return found


def resources(kernel: CompiledKernel, capability: int) -> dict[str, int]:
    """Registers, spilled bytes, shared memory, resident blocks per multiprocessor, and SASS instruction counts.

    Spills come from `ptxas -v`: `cuobjdump` reports no local memory even where there are some.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        sass = _tool("nvdisasm", "-c", cubin)
        report = _assemble(ptx, _match(r"\.target (sm_\w+)", kernel.asm["ptx"])[1])
    spills = _match(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = int(_match(r"Used (\d+) registers", report)[1])
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers_per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    blocks = min(65536 // (registers_per_warp * warps), 64 // warps, SHARED_MEMORY[capability] // (shared + 1024))
    return {
        "registers": registers,
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": shared,
        "warps": warps,
        "blocks_per_sm": blocks,
        "mma": count(r"HMMA|HGMMA"),
        "wgmma": count(r"HGMMA"),
        "cp_async": count(r"LDGSTS"),
        "loads_128": count(r"LDG\.\S*128"),
        "loads": count(r"LDG\."),
        "stores_128": count(r"STG\.\S*128"),
        "stores": count(r"STG\."),
    }


def table(targets: tuple[int, ...] = TARGETS) -> dict[str, dict[str, dict[str, int]]]:
    """`resources` by target ("sm_80") and launch."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for capability in targets:
        rows = found.setdefault(f"sm_{capability}", {})
        for name, launch in launches().items():
            with compiling_for(capability) as compiled:
                launch()
            rows[name] = resources(compiled[-1], capability)
    return found


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the tool's output: {text[:400]}")
    return found


def _tool(name: str, *args: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, args)], capture_output=True, text=True, check=True).stdout


def _assemble(ptx: Path, arch: str) -> str:
    """The report of whichever bundled assembler knows this PTX version (newer PTX needs the Blackwell one)."""
    for name in ("ptxas", "ptxas-blackwell"):
        command = [str(TOOLS / name), "-v", f"-arch={arch}", "-o", os.devnull, str(ptx)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stderr + result.stdout
    raise RuntimeError(f"no bundled ptxas assembles for {arch}: {result.stderr[:400]}")


def main() -> None:
    """Print the table; replace the committed one with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write this Triton's part of {TABLE.name}")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing can be compiled in this process")
    found = {triton.__version__: table()}
    print(json.dumps(found, indent=1))
    if args.write:
        known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        TABLE.write_text(json.dumps(known | found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
