"""`pip install .`: works from any folder, with the configuration that came along."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_installed_commands_find_their_configuration(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    for name in ("common", "model", "data_prep", "vlora", "train", "serve", "conf"):
        if (ROOT / name).is_dir():  # pip builds in the tree: not in this one
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sources = {str(f.relative_to(source)) for f in (source / "model").rglob("*.*") if f.suffix in (".py", ".cu", ".h")}
    assert sources <= {str(f.relative_to(site)) for f in (site / "model").rglob("*.*")}

    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "VLORA_CACHE": str(ROOT / ".cache")}
    environment.pop("VLORA_SITE", None)

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(site / "bin" / "vlora"), *words],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env=environment,
        )

    done = run("train", "experiment=vlora_7b", "check=true")
    assert done.returncode == 0 and "851,891,712" in done.stdout, done.stdout + done.stderr
    assert not list(elsewhere.iterdir())
    assert "vlora evaluate" in run().stdout


def test_the_lock_lies_in_the_range_of_every_requirement():
    """Each names its lower end, which `make test-low` tries, and every one is locked."""
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#")
    locked = {canonicalize_name(name): version for name, version in lock.items()}
    assert "torch" in locked and not any("+" in version for version in locked.values())
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-serve.txt"):
        for line in (ROOT / file).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if text and not text.startswith("-r "):
                requirement = Requirement(text)
                assert locked[canonicalize_name(requirement.name)] in requirement.specifier, line
                lowest = [bound for bound in requirement.specifier if bound.operator in (">=", "==")]
                assert len(lowest) == 1, f"{file}: {line}"
