"""Where the fused base GEMM is used: only at shapes where this GPU has been measured to run it fast enough.

`python -m model.ops.tuner TOKENS D_OUT D_IN RANK [...]` measures on a GPU and writes the table; training only reads
it. No table, or a shape not in it, means cuBLAS. Public reports put Triton between 70 % and 97 % of cuBLAS on an A100,
and the fused form pays from about 97 %, so guessing would lose more often than it wins.
"""

from __future__ import annotations

import argparse
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from common.arguments import Parser, whole
from common.errors import run_cli
from common.files import read_json, write_json

PAYS = 0.97
"""Least speed of the fused GEMM relative to the hybrid form's cuBLAS GEMM at which it is used."""

TILES = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
)


def table_path(device_name: str) -> Path:
    """The table of a GPU model: `$VLORA_TUNING_DIR` or the user's cache, one file per device name."""
    folder = (
        os.environ.get("VLORA_TUNING_DIR") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlora"
    )
    return Path(folder) / f"gemm-{device_name.replace(' ', '-').replace('/', '-')}.json"


@lru_cache(maxsize=8)
def _table(path: Path) -> dict[str, dict]:
    return read_json(path, "remove it, and measure again with python -m model.ops.tuner") if path.exists() else {}


def key(tokens: int, n: int, d: int, r: int, dtype: torch.dtype) -> str:
    """Row of the table. Token counts share a row up to a power of two: the speed ratio changes slowly with them."""
    return f"T{1 << max(0, tokens - 1).bit_length()} n{n} d{d} r{r} {str(dtype).removeprefix('torch.')}"


def tile_for(x: Tensor, n: int, d: int, r: int) -> dict | None:
    """The tile of the fused GEMM `x [T, d] W [n, d]` where it has been measured to pay, else None (use cuBLAS)."""
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    row = _table(table_path(name)).get(key(x.shape[0], n, d, r, x.dtype))
    return row["tile"] if row and row["ratio"] >= PAYS else None


def measure(tokens: int, n: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Time every tile on the current GPU: `{"tile": the best, "ratio": hybrid form's time / that tile's time}`."""
    from triton.testing import do_bench

    from model.ops.triton.gemm import gemm_lowrank

    x, w = (torch.randn(s, d, device="cuda", dtype=dtype) for s in (tokens, n))
    z, b = torch.randn(tokens, r, device="cuda", dtype=dtype), torch.randn(r, n, device="cuda", dtype=dtype)
    hybrid = do_bench(lambda: torch.mm(z, b).addmm_(x, w.t()))
    times = [do_bench(lambda tile=tile: gemm_lowrank(x, w, z, b, **tile)) for tile in TILES]
    best = min(range(len(TILES)), key=times.__getitem__)
    return {"tile": TILES[best], "ratio": hybrid / times[best]}


def main() -> None:
    """Measure the given shapes and write the table of this GPU."""
    parser = Parser(
        prog="python -m model.ops.tuner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="+", type=whole(1), help="TOKENS D_OUT D_IN RANK, repeated")
    numbers = parser.parse_args().shape
    if len(numbers) % 4:
        parser.error(f"{len(numbers)} numbers: shapes are groups of four numbers: TOKENS D_OUT D_IN RANK")
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the fused GEMM is only used where it has been measured")
    path = table_path(torch.cuda.get_device_name())
    table = dict(_table(path))
    for i in range(0, len(numbers), 4):
        tokens, n, d, r = numbers[i : i + 4]
        row = measure(tokens, n, d, r)
        table[key(tokens, n, d, r, torch.bfloat16)] = row
        print(f"{tokens} x {n} x {d} r {r}: {row['ratio']:.3f} of the hybrid form's speed, tile {row['tile']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)
    print(path)


if __name__ == "__main__":
    run_cli(main)
