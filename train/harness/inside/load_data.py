"""Loads the data of tasks, which downloads what is missing where there is internet. Runs in lmms-eval's environment.

    python load_data.py INCLUDE_PATH TASK...

Prints one line of JSON per task on its end: `{"task": ..., "error": null or text}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

# One try alone: where there is no internet, a second one finds no more.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from lmms_eval.tasks import TaskManager, get_task_dict


def main() -> None:
    """Load every task."""
    manager = TaskManager(include_path=sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    for name in sys.argv[2:]:
        error = None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                get_task_dict([name], manager, "chat")
        except Exception as caught:  # whatever a data set's loading raises
            inner = getattr(caught, "last_attempt", None)
            told = inner.exception() if inner is not None else caught
            error = " ".join(f"{type(told).__name__}: {told}".split())[:300]
        print(json.dumps({"task": name, "error": error}), file=out, flush=True)


if __name__ == "__main__":
    main()
