"""Errors whose message is meant for the user: printed as one line, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right: a configuration, a file, the environment."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code.

    A `ValueError` or `OSError` raised by the model or the data also speaks to the user. Set `VLORA_TRACEBACK=1` for
    the traceback. Anything else is a bug and shows its traceback.
    """
    try:
        code = main()
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("VLORA_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
