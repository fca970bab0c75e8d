"""`python -m model.ops.cuda.build`: compile the CUDA merge, once per node image or when it is first used.

    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" python -m model.ops.cuda.build     # on a login node, for A100 and newer

The conventions are those of PyTorch's and DeepSpeed's extensions: `TORCH_CUDA_ARCH_LIST` names the targets (else the
GPUs of this machine, else A100 and newer), `TORCH_EXTENSIONS_DIR` the folder, `CUDA_HOME` the compiler. The compiler is
called directly and not through `torch.utils.cpp_extension`, because the source includes no torch header: it builds on a
login node whose torch is a CPU build, takes seconds, and the library loads under every torch of the supported range.
Source and targets stand in the library's name, so a library is never used after the source has changed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from common.errors import UserError, run_cli

SOURCE = Path(__file__).with_name("merge.cu")
DEFAULT_TARGETS = "8.0;9.0+PTX"
"""A100 and H100; newer GPUs compile the PTX when they load it."""

_TARGET = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")

Capability = tuple[int, int]


def targets() -> str:
    """`TORCH_CUDA_ARCH_LIST`, else the GPUs of this machine, else `DEFAULT_TARGETS`; as "8.0;9.0+PTX"."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST", "").split():
        return ";".join(named)
    here = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    return ";".join(f"{major}.{minor}" for major, minor in here) or DEFAULT_TARGETS


def find(capability: Capability) -> Path | None:
    """A library built from today's source that runs on a GPU of this compute capability, or None."""
    for library in sorted(_folder().glob(f"merge-{_digest()}-*.so")):
        built_for = library.stem.split("-", 2)[2].replace("_", ";")
        if any(_runs_on(target, capability) for target in built_for.split(";")):
            return library
    return None


def build(chosen: str | None = None, *extra: str) -> tuple[Path, str]:
    """Compile `merge.cu` for `chosen` (default: `targets()`) unless that library exists; its path and nvcc's messages.

    Ranks that ask at the same time wait for the first of them. `extra` goes to nvcc (tests ask for its report).

    Raises:
        UserError: no compiler, a target that is none, or nvcc's own message.
    """
    chosen = (chosen or targets()).replace(" ", ";")
    flags = [flag for target in chosen.split(";") if target for flag in _flags(target)]
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"merge-{_digest()}-{chosen.replace(';', '_')}.so"
    with (folder / "merge.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released with the process, so a killed build leaves nothing stale
        if library.exists() and not extra:
            return library, ""
        partial = library.with_suffix(f".{os.getpid()}")
        command = [nvcc(), "-O3", "-std=c++17", *flags, "-Xcompiler", "-fPIC", "-shared", "-cudart", "static", *extra]
        result = subprocess.run([*command, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if result.returncode != 0:
            partial.unlink(missing_ok=True)
            raise UserError(f"nvcc could not build {SOURCE} for {chosen}: {result.stderr.strip()[-800:]}")
        partial.replace(library)
    return library, result.stdout + result.stderr


def nvcc() -> str:
    """The compiler of `CUDA_HOME` (or `CUDA_PATH`), else the one on the PATH, else the toolkit's usual place.

    Raises:
        UserError: none of them has one.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    for candidate in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(candidate):
            return found
    raise UserError(
        "the CUDA merge needs nvcc, which is neither in $CUDA_HOME/bin nor on the PATH; load the CUDA module, build it "
        "on another machine (python -m model.ops.cuda.build, same TORCH_EXTENSIONS_DIR), or set ops.merge=auto"
    )


@lru_cache(maxsize=8)
def load(device_index: int) -> ctypes.CDLL:
    """The library for this process's GPU, built now if no built one runs on it.

    Raises:
        UserError: it cannot be built.
    """
    capability = torch.cuda.get_device_capability(device_index)
    return ctypes.CDLL(str(find(capability) or build(f"{capability[0]}.{capability[1]}")[0]))


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "vlora"


@lru_cache(maxsize=1)
def _digest() -> str:
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]


def _parse(target: str) -> tuple[int, int, str, bool]:
    if not (match := _TARGET.fullmatch(target)):
        raise UserError(
            f"TORCH_CUDA_ARCH_LIST names {target!r}; give compute capabilities, such as {DEFAULT_TARGETS!r}"
        )
    major, minor, variant, ptx = match.groups()
    return int(major), int(minor), variant, bool(ptx)


def _flags(target: str) -> list[str]:
    major, minor, variant, ptx = _parse(target)
    name = f"{major}{minor}{variant}"
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}"]
    return flags + ([f"-gencode=arch=compute_{name},code=compute_{name}"] if ptx else [])


def _runs_on(target: str, capability: Capability) -> bool:
    """Machine code runs within its major version from its minor one on; PTX on everything as new or newer."""
    major, minor, variant, ptx = _parse(target)
    if variant == "a":  # of exactly this architecture
        return capability == (major, minor)
    return (capability[0] == major and capability[1] >= minor) or (ptx and not variant and capability >= (major, minor))


def main() -> int:
    """Build and print where the library lies."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    library, _ = build()
    print(library)
    return 0


if __name__ == "__main__":
    run_cli(main)
