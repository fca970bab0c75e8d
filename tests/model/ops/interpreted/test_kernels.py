"""Each kernel, each case: values, NaN-poisoned outputs, forbidden pages at the ends of every tensor."""

import pytest

from tests.model.ops.interpreted.checks import cases, kernel_module

CASES = cases(full=True)


@pytest.mark.parametrize(("name", "check"), CASES, ids=[name for name, _ in CASES])
def test_kernel(name, check):
    check(kernel_module(name))
