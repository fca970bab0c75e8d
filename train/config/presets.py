"""The presets of conf/: how its files choose among them, and a list of them for `--help`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from common.places import CONF


def first_of(group: str, *names: str) -> str:
    """`${first_of:GROUP,NAME,...}`: the first of these files of a group that there is, or else the last name."""
    return next((name for name in names if (CONF / group / f"{name}.yaml").is_file()), names[-1])


def only_for(path: str, own: str, value: int | None) -> int | None:
    """`${only_for:PATH,OWN,VALUE}`: a value that belongs to the model at OWN; null when PATH is another one."""
    return value if Path(path).expanduser().resolve() == Path(own).expanduser().resolve() else None


def register() -> None:
    """Make them known to OmegaConf."""
    OmegaConf.register_new_resolver("first_of", first_of, replace=True)
    OmegaConf.register_new_resolver("only_for", only_for, replace=True)


def is_sweep(words: list[str]) -> bool:
    """Whether a command line starts several runs, so that `a,b` means two values."""
    experiments = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    files = [CONF / "experiment" / f"{name}.yaml" for name in experiments]
    return bool({"-m", "--multirun"} & set(words)) or any(
        "MULTIRUN" in f.read_text(encoding="utf-8") for f in files if f.is_file()
    )


def help_text() -> str:
    """The groups and their presets, one group a line."""
    lines = ["groups (GROUP=PRESET):"]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != "data_prep"):
        names = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
        lines.append(f"  {folder.name}: {', '.join(names)}")
    return "\n".join(lines)
