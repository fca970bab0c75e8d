"""Collected only in a process of its own; `tests/model/ops/test_triton.py` starts it with `TRITON_INTERPRET=0`."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
