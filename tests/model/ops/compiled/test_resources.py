"""What the compiler makes of every kernel for sm_80 and sm_90 at 7B shapes.

No value test can see these: a mask on the contiguous axis or a lost divisibility hint leaves results right and the
kernel several times slower.
"""

from __future__ import annotations

import json

import pytest
import triton

from benchmarks.ahead_of_time import TABLE, TARGETS, launches, table

COMMITTED = json.loads(TABLE.read_text()).get(triton.__version__)
TARGET_NAMES = [f"sm_{t}" for t in TARGETS]

MIN_BLOCKS = {"shrink": 3, "expand": 2, "factor_grad": 2, "gemm_lowrank": 1, "merge": 2}
"""Resident blocks per multiprocessor that the kernels are laid out for."""


@pytest.fixture(scope="module")
def found():
    return table()


@pytest.mark.skipif(COMMITTED is None, reason="the committed table has no part of this Triton")
def test_committed_table_is_current(found):
    assert found == COMMITTED, "run: python -m benchmarks.ahead_of_time --write"


@pytest.mark.parametrize("target", TARGET_NAMES)
@pytest.mark.parametrize("launch", launches())
def test_budget(found, target, launch):
    row = found[target][launch]
    assert row["spill_bytes"] == 0
    assert row["mma"] > 0, "no tensor-core instruction"
    assert row["stores_128"] == row["stores"] > 0, "a result is not stored 16 bytes at a time"
    assert row["blocks_per_sm"] >= MIN_BLOCKS[launch.split()[0]]
    if target == "sm_90":
        assert row["wgmma"] > 0
    if launch.startswith(("shrink", "gemm_lowrank")):
        assert row["cp_async"] >= 16, "the inner loop is not pipelined"
