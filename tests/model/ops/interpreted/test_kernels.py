"""Each kernel, each case: values, NaN-poisoned outputs, forbidden pages at the ends of every tensor."""

import pytest

from model.ops import triton_kernels
from tests.model.ops.interpreted.checks import cases

CASES = cases(full=True)


@pytest.mark.parametrize("check", [check for _, check in CASES], ids=[name for name, _ in CASES])
def test_kernel(check):
    check(triton_kernels)
