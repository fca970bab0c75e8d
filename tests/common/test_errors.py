"""Exit codes: 2 is for the user, and no new start cures it; 1 may go away."""

import errno

import pytest

from common.errors import UserError, report_errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("wrong"), 2),
        (ValueError("wrong"), 2),
        (FileNotFoundError(errno.ENOENT, "no such file"), 2),
        (OSError(errno.ENOSPC, "disk full"), 2),
        (OSError("raised by a library, without a number"), 2),
        (OSError(errno.ESTALE, "stale file handle"), 1),
        (OSError(errno.EIO, "input/output error"), 1),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 1),
    ],
)
def test_exit_codes(error, code, capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    def fails():
        raise error

    assert report_errors(fails) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bug_shows_its_traceback():
    def fails():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        report_errors(fails)
