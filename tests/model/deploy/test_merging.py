"""One image's deltas inside the weights, beside them, and in a LoRA adapter: the same model three times."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.decoder.injection import eject
from model.deploy.adapter import save_adapter
from model.deploy.merging import merged
from tests.model import parts

MERGEABLE = "q,k,v,o,gate,up,down"


def build(types: str, name: str = "llama-gqa", dtype: torch.dtype = torch.float32):
    """A tiny model, the weights of two images, and token ids of two rows."""
    model = parts.build(parts.config(types=types), name).eval()
    batch = parts.batch(rows=[0, 1], images=[0, 1])
    with torch.no_grad():
        weights = model.condition(batch).weights
    a, b = ({site: t.to(dtype) for site, t in factors.items()} for factors in (weights.a, weights.b))
    return model.llm.to(dtype), replace(weights, a=a, b=b), batch.input_ids


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "qwen3", "gemma2", "phi"])
@torch.no_grad()
def test_merged_logits_are_branch_logits_and_restoring_is_exact(name):
    llm, weights, ids = build("q,k,v,o,up,down" if name == "phi" else MERGEABLE, name)
    before, plain = {k: v.clone() for k, v in llm.state_dict().items()}, llm(input_ids=ids).logits
    for sample in (1, 0):
        branch = llm(input_ids=ids, perceptual_weights=weights.select(torch.tensor([sample]))).logits
        with merged(llm, weights, sample) as report:
            assert report.branches == ()
            torch.testing.assert_close(llm(input_ids=ids).logits, branch, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(branch, plain, atol=1e-3)
    assert {k: torch.equal(v, before[k]) for k, v in llm.state_dict().items()} == dict.fromkeys(before, True)
    assert torch.equal(llm(input_ids=ids).logits, plain)


@pytest.mark.parametrize("types", [None, ("q", "v"), ("k", "o")])
@torch.no_grad()
def test_what_is_not_merged_runs_as_a_branch(types):
    llm, weights, ids = build("q,k,v,o,m")
    branch = llm(input_ids=ids, perceptual_weights=weights.select(torch.tensor([1]))).logits
    with merged(llm, weights, 1, types) as report:
        assert "m" in report.branches
        assert "m      runs as a branch: 'm' runs beside the whole MLP" in str(report)
        torch.testing.assert_close(llm(input_ids=ids).logits, branch, rtol=1e-5, atol=1e-5)
        out = llm.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, ids.shape[1] + 3)


@torch.no_grad()
def test_m_and_unplaced_types_are_refused_and_an_error_restores_the_weights():
    llm, weights, ids = build("q,m")
    plain = llm(input_ids=ids).logits
    for types, message in (
        (("q", "m"), "'m' cannot be merged: .* MLP"),
        (("k",), "'k' cannot be merged: placed are q, m"),
    ):
        with pytest.raises(ValueError, match=message), merged(llm, weights, 0, types):
            pass
    with pytest.raises(RuntimeError, match="inside"), merged(llm, weights, 0):
        raise RuntimeError("inside")
    assert torch.equal(llm(input_ids=ids).logits, plain)


@torch.no_grad()
def test_the_loss_by_rounding_is_measured_and_reported():
    """bf16 keeps eight bits of W: an update of relative size s loses about 1.7e-3 / s of itself."""
    llm, weights, _ = build(MERGEABLE, dtype=torch.bfloat16)
    weights = replace(weights, scale=0.01)  # the tiny model's deltas are larger than its weights
    with merged(llm, weights, 0) as report:
        for weight_type in MERGEABLE.split(","):
            assert 1e-3 < report.loss(weight_type) * report.size(weight_type) < 2.5e-3
        assert f"{report.loss('gate'):.2%}" in str(report)
    llm, weights, _ = build(MERGEABLE)
    with merged(llm, weights, 0) as report:
        assert max(report.loss(t) for t in MERGEABLE.split(",")) < 1e-5


@torch.no_grad()
def test_adapter_is_the_branch(tmp_path):
    """Read back as PEFT's documentation says: W x + lora_alpha / r * B (A x), by module name."""
    llm, weights, ids = build(MERGEABLE)
    branch = llm(input_ids=ids, perceptual_weights=weights.select(torch.tensor([1]))).logits
    save_adapter(tmp_path / "adapter", llm, weights, 1, "base/model")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "base/model"
    assert len(tensors) == 2 * len(config["target_modules"]) == 2 * len(weights.placement.sites)
    eject(llm)
    scale = config["lora_alpha"] / config["r"]

    def add(linear: nn.Linear, given: tuple[torch.Tensor], y: torch.Tensor, name: str) -> torch.Tensor:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape == (config["r"], linear.in_features) and b.shape == (linear.out_features, config["r"])
        return y + scale * (given[0] @ a.T) @ b.T

    for name in config["target_modules"]:
        llm.get_submodule(name).register_forward_hook(lambda *args, name=name: add(*args, name))
    torch.testing.assert_close(llm(input_ids=ids).logits, branch, rtol=1e-5, atol=1e-5)


def test_adapter_refuses_m(tmp_path):
    llm, weights, _ = build("q,k,m")
    with pytest.raises(ValueError, match="'m' has no place in a LoRA adapter: .*; types=q,k leaves it out"):
        save_adapter(tmp_path, llm, weights, 0, "base")
    save_adapter(tmp_path, llm, weights, 0, "base", types=("q", "k"))
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4 * len(weights.placement.layers)
