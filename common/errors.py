"""Errors whose message is meant for the user: printed as one line, without a traceback."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from errno import EACCES, EDQUOT, EEXIST, EISDIR, ENAMETOOLONG, ENOENT, ENOSPC, ENOTDIR, EPERM, EROFS

# Operating system errors that come again until someone does something about them. None: raised without a number.
_LASTING = {None, ENOENT, EEXIST, EACCES, EPERM, ENOTDIR, EISDIR, EROFS, ENOSPC, EDQUOT, ENAMETOOLONG}


class UserError(Exception):
    """Something the user can put right: a configuration, a file, the environment."""


class ConfigError(UserError):
    """A key or value of a configuration is wrong."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code; see `report_errors`.

    Under a locale whose letters are not UTF-8's, the command is started again with Python's UTF-8 mode: data name their
    files in UTF-8, and so do we, whatever the locale. (Python does the same by itself under the locale C.)
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without a letter of a path or a text must end nothing
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(report_errors(main))


def report_errors(main: Callable[[], int | None]) -> int:
    """Run `main`; an error that speaks to the user becomes one line on stderr and exit code 2.

    A `ValueError` or `OSError` raised by the model or the data also speaks to the user, but an `OSError` that a new
    start may cure (a lost connection, a stale file handle, an I/O error) exits with 1. Set `VLORA_TRACEBACK=1` for the
    traceback. Anything else is a bug and shows its traceback. Where the reader of its output goes away (`| head`), the
    command ends in silence, as others do.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except (UserError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 128 + signal.SIGPIPE
        if os.environ.get("VLORA_TRACEBACK"):
            raise
        _report(" ".join(str(error).split()) or type(error).__name__)
        return 1 if isinstance(error, OSError) and error.errno not in _LASTING else 2
    except KeyboardInterrupt:
        return 130


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; then nothing is written to it at exit either."""
    state = select.poll()
    state.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in state.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _report(text: str) -> None:
    """Tell the user once: through the launcher, if one started this process as one of several, else directly."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows "message", `train.process.launch` "user_error".
        record = {"user_error": text, "message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(record, stream)
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)
