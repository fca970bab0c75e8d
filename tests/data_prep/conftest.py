"""Fixtures of the data tests: real parts from the cache, without the network."""

import pytest

from data_prep.parts import builtin as parts


@pytest.fixture(scope="session")
def part():
    """Folder of a converted part by name; `make test` prepares them before."""
    return lambda name: parts.ensure(name, fetch=False)
