"""What holds for every process of the suite, and which files start first."""

import os
import sys

from common.places import cache

# The suite starts about a hundred interpreters. Where a container says that no bytecode is to be kept, each of them
# would compile torch, transformers and DeepSpeed anew: 7 of the 11 seconds that their imports take.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(cache() / "bytecode")
    sys.dont_write_bytecode = False
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two files at a time

# What takes longest. The quick files after it fill what is left of both workers' time.
FIRST = ("test_demo.py", "test_engine.py", "test_runs.py", "test_triton.py", "test_gpu_benchmark.py", "test_chaos.py")


def pytest_collection_modifyitems(items):
    """Start with `FIRST`; the rest stays in its order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
