"""The GPU benchmark's code path at a tiny size: every kernel it times computes what its row says."""

import time

import torch

from benchmarks.kernels import kernels, measure, predict


def test_every_timed_kernel_is_right():
    def bench(run):
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    found = measure(2, 16, bench, d=32, r=16, device="cpu", dtype=torch.float32, matrices=2)
    assert found.pop("device")["copy_bytes_per_s"] > 0
    assert list(found) == [k.name for k in kernels(2, 16, d=32, r=16, matrices=2)]
    assert all(row["error"] < 1e-6 for row in found.values()), found


def test_prediction_is_arithmetic_on_shapes():
    found = predict(96, 64)
    # A100: 3 * 206 GFLOP at 312 TFLOP/s.
    base = found["kernels"]["base x Wᵀ (x3)"]
    assert abs(base["roofline_us"] / (3 * 2 * 96 * 64 * 4096**2 / 312e12 * 1e6) - 1) < 1e-12
    # x, three A and three z, once each, at 2 TB/s (notes: 34 us for each of the three).
    assert abs(found["kernels"]["shrink q,k,v"]["roofline_us"] / 3 - 34) < 1
    assert 0 < found["overhead"]["forward"] < found["overhead"]["forward + backward"] < 0.3
