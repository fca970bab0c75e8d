"""What preflight says about machines that are not fit; a fit one is in test_training.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.slurm.conftest import ROOT
from train.preflight import Report, check_first_host, check_space, summarise


def preflight(**variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "VLORA_"))}
    command = [sys.executable, "-m", "train.preflight"]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def test_missing_gpus_are_named() -> None:
    done = preflight(SLURM_GPUS_ON_NODE="64")
    assert done.returncode == 2 and "64 GPUs were asked for on this node" in done.stdout


def test_fit_machine(tmp_path: Path) -> None:
    done = preflight(VLORA_SCRATCH=str(tmp_path), VLORA_MIN_FREE_GIB="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr


def test_master_must_be_the_first_host() -> None:
    for address, nodes, word in (("n2", 2, "must be the first host"), ("localhost", 2, "wait for itself alone")):
        report = Report(host="n1")
        check_first_host(report, address, rank=0, nodes=nodes)
        assert word in report.problems[0]
    report = Report(host="n1")
    check_first_host(report, "n1.cluster", rank=0, nodes=2)
    assert not report.problems


def test_space(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = Report()
    check_space(report, [tmp_path / "new", tmp_path / "file"], least_gib=1e6)
    assert "GiB free" in report.problems[0] and "cannot be used" in report.problems[1]


def test_summary_names_hosts_that_differ_slow_links_and_clocks() -> None:
    reports = [Report(host=h, facts={"torch": v}) for h, v in (("n1", "2.13"), ("n1", "2.13"), ("n2", "2.12"))]
    text, fit = summarise(reports, {"all-reduce GB/s": 100.0, "links": [200.0, 20.0, 2.0]}, skew=9.0)
    assert not fit
    assert "torch differs between nodes (2.13 on n1; 2.12 on n2)" in text
    assert "slowest 2.00 GB/s, rank 2 (n2) -> 0 (n1)" in text and "10 times slower" in text
    assert "clocks differ by 9.0 s" in text
