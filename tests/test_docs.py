"""What README and docs point at is there."""

import re
from inspect import cleandoc
from pathlib import Path

import pytest

from train.process.run_files import RunDir

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE_BY_USERS = {"slurm/site.sh"}
ROOMS = "common|model|data_prep|train|vlora|serve|conf|slurm|tests|benchmarks|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    named = re.findall(rf"`((?:{ROOMS})/[\w./-]*\w(?:\.\w+)?/?)[`:]", text)
    linked = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [
        name
        for name in named
        if not re.search("NAME|DEVICE", name) and name not in MADE_BY_USERS and not (ROOT / name).exists()
    ]
    missing += [link for link in linked if not (page.parent / link).exists()]
    assert not missing, f"{page.name} points at what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_modules(page):
    modules = set(
        re.findall(r"python -m ((?:model|data_prep|train|vlora|serve|benchmarks|tests)[\w.]*)", page.read_text())
    )
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: python -m {module}"


def test_every_make_target_is_explained():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), f"make help does not list {target}"


def test_the_files_of_a_run_directory_are_those_of_the_readme():
    table = cleandoc(RunDir.__doc__).partition("\n| file |")[2]
    assert f"| file |{table}".strip() in (ROOT / "README.md").read_text()
    listed = {name.rstrip("/") for name in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)}
    named = {getattr(RunDir(Path()), name).name for name, kind in vars(RunDir).items() if isinstance(kind, property)}
    assert named < listed
    shell = (ROOT / "slurm/body.sh").read_text()
    assert set(re.findall(r"RUN_DIR/([A-Za-z.]+)", shell)) <= listed


def test_every_environment_variable_stands_in_the_table():
    rooms = ("common", "model", "data_prep", "vlora", "train", "serve", "slurm", "conf")
    files = [f for room in rooms for f in (ROOT / room).rglob("*") if f.suffix in (".py", ".sh", ".sbatch", ".yaml")]
    read = {name for file in files for name in re.findall(r"VLORA_[A-Z][A-Z_]*", file.read_text())}
    listed = re.findall(r"^\| `(VLORA_\w+)`", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    assert sorted(read) == sorted(listed)
