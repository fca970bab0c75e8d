"""lmms-eval's own environment: where it is, what it is told, and its processes, none of which outlives us."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.places import CHECKOUT

VERSION = "0.7.3"
PYTHON = "python"
"""Folder, in that of the tasks, of our packages as its processes import them."""
_HOW = "make benchmarks-env builds it, or name one with environment=FOLDER"


@dataclass(frozen=True)
class Environment:
    """An environment that lmms-eval is installed in.

    Attributes:
        python: Its interpreter.
        tasks: Folder of lmms-eval's tasks.
    """

    python: Path
    tasks: Path

    @classmethod
    def find(cls, folder: str | None = None) -> Environment:
        """The environment in `folder`; None: that of VLORA_BENCHMARKS, or `.venv-benchmarks` of the checkout.

        Raises:
            UserError: it is not there, or holds another version of lmms-eval.
        """
        named = folder or os.environ.get("VLORA_BENCHMARKS")
        root = Path(named) if named else (CHECKOUT or Path.cwd()) / ".venv-benchmarks"
        python = root / "bin" / "python"
        if not python.is_file():
            raise UserError(f"{root}: no environment for the benchmarks there; {_HOW}")
        installed = sorted(root.glob("lib/python3*/site-packages/lmms_eval-*.dist-info"))
        versions = [path.name.removeprefix("lmms_eval-").removesuffix(".dist-info") for path in installed]
        if versions != [VERSION]:
            raise UserError(f"{root} has lmms-eval {', '.join(versions) or 'not at all'}, not {VERSION}; {_HOW}")
        return cls(python.absolute(), installed[0].parent / "lmms_eval" / "tasks")

    def variables(self, path: Path, offline: bool) -> dict[str, str]:
        """Variables of its processes: none of this environment's Python, and no judge that costs money.

        Args:
            path: Folder of `jobs.write_tasks`.
            offline: Take data from the cache alone.
        """
        # With the variables of a rank it would take itself for one.
        left_out = ("PYTHON", "OPENAI_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        ours = {"PYTHONPATH": str(path / PYTHON), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        # A judge that is asked in spite of all finds nobody.
        ours |= {"OPENAI_API_URL": "http://127.0.0.1:9/none", "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
        if offline:
            # lmms-eval's tasks want a token even for what is in the cache.
            ours |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_TOKEN": kept.get("HF_TOKEN", "offline")}
        return kept | ours

    def load_data(self, folder: Path, tasks: Sequence[str], offline: bool) -> dict[str, str]:
        """Load the data of tasks: from the cache alone, or downloading what is missing.

        Args:
            folder: Where tasks of ours are.
            tasks: Their names.
            offline: From the cache alone.

        Returns:
            What is wrong, by task; those that are there are left out.

        Raises:
            UserError: lmms-eval itself does not start.
        """
        command = [str(self.python), str(folder / "load_data.py"), str(folder), *tasks]
        with Process(command, self.variables(folder, offline), folder / "load_data.log", pipe=True) as process:
            out, _ = process.popen.communicate()
        found = [json.loads(line) for line in out.decode().splitlines() if line.startswith('{"task"')]
        if {each["task"] for each in found} != set(tasks):
            raise UserError(f"lmms-eval does not start; {folder / 'load_data.log'} tells why")
        return {each["task"]: each["error"] for each in found if each["error"] is not None}


class Process:
    """A process and its children, in a group of their own that ends with the `with` block, and when we are killed.

    Args:
        command: Its words.
        variables: Its environment.
        log: File that its output is added to.
        pipe: Keep its standard output out of the log, to be read.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path, pipe: bool = False) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as stream:
            self.popen = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and all of its group."""
        for sent, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(patience)
                break
        with suppress(ProcessLookupError, PermissionError):  # children of one that went by itself
            os.killpg(self.popen.pid, signal.SIGKILL)

    def tail(self) -> str:
        """The last line of its log that says something."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace", encoding="utf-8")).splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")[:300]


_LIBC = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def _end_with_parent() -> None:
    prctl = getattr(_LIBC, "prctl", None)  # Linux alone
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
