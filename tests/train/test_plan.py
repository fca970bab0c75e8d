"""The plan's counts are the paper's, and its memory and step follow from its own rates."""

import subprocess
import sys

import pytest
import torch

from common.errors import ConfigError
from model.connectors import VLoRAConnector
from model.loading import build_llm
from tests.train.world import ROOT
from train import plan
from train.config import compose_overrides, resolve


@pytest.mark.slow
def test_counts_are_the_papers():
    """Notes on the paper: 851.9 M and 7.894 B; by rank 339.7 to 1,534.8 M, by blocks 767.8 to 936.0 M."""
    options, systems = plan.configurations(["experiment=vlora_7b", "nodes=1,4", "gpu=H800", "stage=pretrain"])
    assert options.gpu == "H800" and list(systems) == ["vlora", "mlp"] and systems["mlp"].data.batch_size == 256
    one, four = (dict(column) for column in plan.table(systems["vlora"], options, [1, 4]))
    assert (one["parameters: trained, M"], one["parameters: total, M"]) == ("851.9", "7,893.8")
    assert float(four["memory: weights, GiB"]) == pytest.approx(float(one["memory: weights, GiB"]) / 4, rel=0.05)
    assert 96 <= int(one["rows of 128 tokens that fit"].split()[0]) < 200  # 96 a GPU is the paper's
    assert float(four["step: predicted, s"]) >= float(four["step: exchange, s"])
    config = resolve(compose_overrides(["experiment=vlora_7b"])).model
    llm = build_llm(config.llm, torch.bfloat16, meta=True)
    sizes = {("rank", 16): 339.7, ("rank", 32): 510.4, ("rank", 128): 1534.8}
    sizes |= {("num_blocks", 4): 767.8, ("num_blocks", 12): 936.0}
    for (key, value), millions in sizes.items():
        config = resolve(compose_overrides(["experiment=vlora_7b", f"generator.{key}={value}"])).model
        with torch.device("meta"):
            connector = VLoRAConnector.build(config, llm, 576, 1024)
        assert sum(p.numel() for p in connector.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_plan_imports_no_deepspeed():
    """It warns about accelerators when it is imported."""
    code = "import sys, train.plan, train.__main__; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0


def test_the_table_shows_every_row_once_and_wrong_words_are_named():
    columns = {"a": [("parameters: x", "1"), ("step", "2")], "b": [("parameters: y", "3"), ("step", "4")]}
    lines = plan.render(columns).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "b"],
        ["parameters:", "x", "1"],
        ["parameters:", "y", "3"],
        ["step", "2", "4"],
    ]
    with pytest.raises(ConfigError, match="gpu=H101.*choose"):
        plan.configurations(["gpu=H101"])
    with pytest.raises(ConfigError, match=r"generator\.rnak.*generator\.rank"):
        plan.configurations(["generator.rnak=3"])
