"""The container recipes without a container: every line is one the builders know, and all that they copy is there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from common.places import CHECKOUT

FOLDER = CHECKOUT / "containers"
DOCKER = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN"}
APPTAINER = {"files", "environment", "post", "test"}


def instructions(text: str) -> list[tuple[str, str]]:
    """Word and argument of each instruction of a Dockerfile; continued lines are one."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_dockerfile():
    found = instructions((FOLDER / "Dockerfile").read_text())
    assert {word for word, _ in found} <= DOCKER
    assert found[:2] == [("ARG", "BASE"), ("FROM", "${BASE}")]  # nothing but an ARG may stand before FROM
    for word, rest in found:
        if word == "COPY":
            *sources, target = rest.split()
            assert target.startswith("./") and all((CHECKOUT / source).exists() for source in sources), rest
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)


def test_apptainer_definition():
    header, *sections = re.split(r"^%", (FOLDER / "vlora.def").read_text(), flags=re.MULTILINE)
    keys = dict(line.split(": ", 1) for line in header.splitlines() if line and not line.startswith("#"))
    assert keys == {"Bootstrap": "docker", "From": "{{ BASE }}"}
    found = {name: body for name, _, body in (section.partition("\n") for section in sections)}
    assert set(found) == APPTAINER
    for line in found["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert (CHECKOUT / source).exists() and target.startswith("/opt/vlora/")
    for name in APPTAINER - {"files"}:
        subprocess.run(["bash", "-n", "-c", found[name]], check=True)


def test_both_recipes_do_the_same():
    docker = " ".join(rest for word, rest in instructions((FOLDER / "Dockerfile").read_text()) if word == "RUN")
    post = (FOLDER / "vlora.def").read_text().split("%post")[1]
    for command in ("bash install.sh requirements.txt", "python -m model.ops.cuda.build", "rm -rf common model"):
        assert command in docker and command in post


def test_only_what_is_missing_is_installed(tmp_path):
    """A Python that has its own torch and transformers keeps them, whatever their version."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nif [ "$3" = list ]; then\n'
        "printf 'torch==2.10.0a0+b4e4ee8\\nTransformers==5.17.0\\nhydra_core==1.3.8\\n'\n"
        f'else echo "$@" > {tmp_path}/called; cp "${{@: -1}}" {tmp_path}/missing; fi\n'
    )
    python.chmod(0o755)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# a comment\ntorch>=2.9.0,<3\ntransformers>=5.17.0,<6\nhydra-core>=1.3.2\n\ntqdm>=4.67.1  # why\n"
    )
    command = ["bash", str(FOLDER / "install.sh"), str(requirements)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHON": str(python), "WHEELHOUSE": "/wheels"})
    assert (tmp_path / "missing").read_text() == "tqdm>=4.67.1\n"
    called = (tmp_path / "called").read_text()
    assert "--no-index --find-links /wheels" in called and "--constraint" in called


def test_site_profiles_are_shell_and_set_what_the_example_does(tmp_path):
    known = set(re.findall(r"^export (\w+)=", Path(CHECKOUT / "slurm" / "site.example.sh").read_text(), re.MULTILINE))
    profiles = sorted((CHECKOUT / "slurm" / "sites").glob("*.sh"))
    assert len(profiles) == 3
    for profile in profiles:
        script = f"source {profile}; site_environment; declare -p VLORA_CONTAINER VLORA_WANDB"
        home = {"PATH": os.environ["PATH"], "SCRATCH": str(tmp_path), "USER": "u", "SLURM_JOB_ID": "1"}
        subprocess.run(["bash", "-eu", "-c", script], check=True, env=home, capture_output=True)
        assert set(re.findall(r"^export (VLORA_\w+)=", profile.read_text(), re.MULTILINE)) <= known, profile
