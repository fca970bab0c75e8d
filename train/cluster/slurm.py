"""Talks to SLURM from a login node: the batch scripts of `slurm/`, submitted under the site's profile."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from common import places
from common.errors import UserError


def command(script: str, arguments: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The words of an sbatch call.

    Args:
        script: Name of a file in `slurm/`.
        arguments: What the script is called with.
        options: Long options without dashes; true: a flag; null or false: left out.
    """
    words = ["sbatch", "--parsable"]
    for name, value in options.items():
        name = name.replace("_", "-")
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    return [*words, f"slurm/{script}", *arguments]


def submit(words: Sequence[str]) -> str:
    """Submit a job with the site's profile loaded; returns its id.

    Raises:
        UserError: no checkout or no SLURM here, or it refuses the job.
    """
    root = places.checkout("submitting to SLURM")
    site = os.environ.get("VLORA_SITE", str(root / "slurm/site.sh"))
    # The profile is a shell file; the words never pass through the shell's parser.
    script = 'if [ -f "$1" ]; then source "$1"; fi; shift; exec "$@"'
    try:
        done = subprocess.run(["bash", "-c", script, "_", site, *words], cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"cannot run bash ({error})") from error
    if done.returncode == 127:
        raise UserError(
            "sbatch is not found: submit from a login node of the cluster, or leave out hydra/launcher=slurm"
        )
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]


def states(job: str) -> dict[str, str]:
    """State of each element of a job (or of the job alone), by id; {} where SLURM does not know it (any more)."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--array", f"--jobs={job}", "--states=all", "--format=%i %T"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return {}
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
