"""Tests of what a GPU alone can show. Without one they run only under Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton cannot even be imported for a device that is not there.
collect_ignore_glob = [] if find_spec("triton") and (torch.cuda.is_available() or INTERPRETED) else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `gpu`."""
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")
