"""Exit codes: 2 is for the user, and no new start cures it; 1 may go away."""

import errno
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_ends_a_command_in_silence(lines):
    program = f"from common.errors import run_cli; run_cli(lambda: print('a line\\n' * {lines}))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_told(capfd, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    def fails():
        raise BrokenPipeError(errno.EPIPE, "the loader is gone")

    assert report_errors(fails) == 1
    assert "the loader is gone" in capfd.readouterr().err


def test_a_bug_shows_its_traceback():
    def fails():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        report_errors(fails)


def test_files_of_utf8_names_and_texts_are_read_under_any_locale(tmp_path):
    """Plain ASCII here, as it is on every machine; ISO-8859-1 takes the same way."""
    name = "\u56fe \u00e9.txt"
    (tmp_path / name).write_text(f"{name}\n", encoding="utf-8")
    main = f"import common.errors, pathlib; common.errors.run_cli(lambda: print(open({ascii(name)}).read()))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "PYTHONIOENCODING")} | locale
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", main], env=environment, cwd=tmp_path, capture_output=True)
    assert done.stdout.decode().strip() == name, done.stderr
