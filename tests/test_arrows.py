"""The allowed arrows between folders: common <- model <- data_prep <- train, and model <- vlora, serve."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PREPARED = ("data_prep.store", "data_prep.text")  # what is made of prepared files: no reader of sources, no command
ALLOWED = {
    "common": ("common",),
    "model": ("common", "model"),
    "data_prep": ("common", "model", "data_prep"),
    "vlora": ("common", "model", "vlora", *PREPARED),
    "train": ("common", "model", "train", "vlora", *PREPARED),
    "train command": ("common", "model", "train", "vlora", "data_prep"),
    "serve": ("common", "model", "serve", "vlora", *PREPARED),
}
KNOW_NO = {"common": ("hydra", "deepspeed"), "model": ("hydra", "omegaconf", "deepspeed", "datasets", "wandb")}
"""Model and common are a library: nothing in them starts, composes or trains."""
PINS = ("requirements.txt", "requirements-serve.txt")
ROOMS = [room for room in ("common", "model", "data_prep", "vlora", "train", "serve") if (ROOT / room).is_dir()]
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Full names of all that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_imports_only_what_stands_before_it(room):
    wrong = []
    for file in (f for f in FILES if f.relative_to(ROOT).parts[0] == room):
        kind = "train command" if room == "train" and file.parent == ROOT / "train" else room
        for name in imports(file):
            ours = name.split(".")[0] in ROOMS
            allowed = any(f"{name}.".startswith(f"{prefix}.") for prefix in ALLOWED[kind])
            if (ours and not allowed) or name.split(".")[0] in KNOW_NO.get(room, ()):
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_its_job_in_its_first_line():
    for file in FILES:
        said = ast.get_docstring(ast.parse(file.read_text()))
        if file.name != "__init__.py" or file.read_text().strip():
            assert said and len(said.splitlines()[0]) > 10, f"{file.relative_to(ROOT)} has no docstring"


OPTIONAL = {"triton", "apex", "liger_kernel", "lmms_eval"}
"""Modules that a machine may lack: what needs them says so."""


def test_what_is_imported_is_declared():
    """Not left to come along with something else, which may leave it out in its next version."""
    declared = {
        name: set(re.findall(r"^([\w-]+)[=>]=", (ROOT / name).read_text().lower(), re.MULTILINE)) for name in PINS
    }
    installed = packages_distributions()
    wrong = []
    for file in FILES:
        room = file.relative_to(ROOT).parts[0]
        known = set().union(*(names for pin, names in declared.items() if room == "serve" or "serve" not in pin))
        for module in {name.split(".")[0] for name in imports(file)} - set(ROOMS) - OPTIONAL - sys.stdlib_module_names:
            packages = {name.lower().replace("_", "-") for name in installed.get(module, [module])}
            if not packages & known:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}, which no requirements file names")
    assert not wrong, "\n".join(wrong)
