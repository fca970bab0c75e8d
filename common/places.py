"""Where the files that belong to the code are: in a checkout, or beside the installed packages."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import UserError

_ABOVE = Path(__file__).resolve().parents[1]
CHECKOUT: Path | None = _ABOVE if (_ABOVE / "conf" / "config.yaml").is_file() else None
"""The root of the repository; None where the packages were installed (pip puts `conf/` into the package `vlora`)."""

CONF = (CHECKOUT or _ABOVE / "vlora") / "conf"
"""The folder of the YAML files."""


def checkout(what: str) -> Path:
    """The root of the repository, for `what` needs files that are not installed.

    Raises:
        UserError: the packages were installed without it.
    """
    if CHECKOUT is None:
        raise UserError(f"{what} needs a checkout of the repository: clone it and run the command there")
    return CHECKOUT


def cache() -> Path:
    """Converted parts and prepared data: `$VLORA_CACHE`, or `.cache` of the checkout or else of the current folder."""
    return Path(os.environ.get("VLORA_CACHE") or (CHECKOUT or Path.cwd()) / ".cache")
