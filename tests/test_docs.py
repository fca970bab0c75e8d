"""What the documents say of the code is true of it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_environment_variable_stands_in_the_table():
    rooms = ("common", "model", "data_prep", "vlora", "train", "serve", "slurm", "conf")
    files = [f for room in rooms for f in (ROOT / room).rglob("*") if f.suffix in (".py", ".sh", ".sbatch", ".yaml")]
    read = {name for file in files for name in re.findall(r"VLORA_[A-Z][A-Z_]*", file.read_text())}
    listed = re.findall(r"^\| `(VLORA_\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert sorted(read) == sorted(listed)


def test_every_make_target_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), f"make help does not list {target}"
