"""The two functions that the files of conf/ use to choose among presets."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


def first_of(group: str, *names: str) -> str:
    """`${first_of:GROUP,NAME,...}`: the first of these files of a group that there is, or else the last name."""
    return next((name for name in names if (CONF / group / f"{name}.yaml").is_file()), names[-1])


def only_for(path: str, own: str, value: int | None) -> int | None:
    """`${only_for:PATH,OWN,VALUE}`: a value that belongs to the model at OWN; null when PATH is another one."""
    return value if path == own else None


def register() -> None:
    """Make them known to OmegaConf."""
    OmegaConf.register_new_resolver("first_of", first_of, replace=True)
    OmegaConf.register_new_resolver("only_for", only_for, replace=True)
