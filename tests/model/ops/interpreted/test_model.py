"""A whole grouped-query decoder through the Triton backends: loss and every gradient against plain torch in float64."""

from __future__ import annotations

import json
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.ops import Rows, lowrank_delta, lowrank_linear, lowrank_linear_group, set_backend, split_perceptual, tuner

RANK, SCALE, LAYERS = 8, 0.5, 2
ROWS = Rows.padded([0, -1, 1, 1], 3)  # a row without image, two rows of one sample, a sample without rows
LENGTH = 7


def build(dtype: torch.dtype) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model and its factors: `generated` by type [S, layers, d_in, r] and B by (type, layer)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    generated = {t: torch.randn(3, LAYERS, 32, RANK).div(4).to(dtype).requires_grad_() for t in "qkvom"}
    shared = {
        f"{t}{i}": torch.randn(RANK, 16 if t in "kv" else 32).div(4).to(dtype).requires_grad_()
        for t in "qkvom"
        for i in range(LAYERS)
    }
    return model, generated, shared


def inject(model: LlamaForCausalLM, generated: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> None:
    """q, k and v through one grouped call, made when q runs; o singly; m beside the MLP."""
    factors = {t: split_perceptual(g) for t, g in generated.items()}
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        group = [attention.q_proj, attention.k_proj, attention.v_proj]
        ready: dict[nn.Module, torch.Tensor] = {}

        def qkv(self, x, i=i, group=group, ready=ready):
            if self not in ready:
                a, b = [factors[t][i] for t in "qkv"], [shared[f"{t}{i}"] for t in "qkv"]
                weights, biases = [p.weight for p in group], [p.bias for p in group]
                outputs = lowrank_linear_group(x, weights, a, b, SCALE, biases=biases, rows=ROWS)
                ready.update(zip(group, outputs, strict=True))
            return ready.pop(self)

        def o(self, x, i=i):
            return lowrank_linear(x, self.weight, factors["o"][i], shared[f"o{i}"], SCALE, bias=self.bias, rows=ROWS)

        def m(self, x, i=i, plain=mlp.forward):
            return plain(x) + lowrank_delta(x, factors["m"][i], shared[f"m{i}"], SCALE, rows=ROWS)

        for projection in group:
            projection.forward = MethodType(qkv, projection)
        attention.o_proj.forward = MethodType(o, attention.o_proj)
        mlp.forward = MethodType(m, mlp)


def loss_and_gradients(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    set_backend(backend)
    model, generated, shared = build(dtype)
    inject(model, generated, shared)
    ids = torch.randint(50, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    wanted = [*generated.values(), *shared.values(), *model.parameters()]
    gradients = torch.autograd.grad(loss, wanted)
    set_backend("auto")
    return [loss.detach(), *gradients]


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A tuning table that allows the fused GEMM at every shape of the model, as the tuner would write it."""
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    rows = {
        tuner.key(4 * LENGTH, n, d, RANK, torch.float32): {"tile": tile, "ratio": 1.0}
        for n in (16, 32)
        for d in (16, 32)
    }
    monkeypatch.setenv("VLORA_TUNING_DIR", str(tmp_path))
    tuner.table_path("cpu").write_text(json.dumps(rows))
    tuner._table.cache_clear()
    yield
    tuner._table.cache_clear()


@pytest.mark.parametrize("backend", ["cpu", "hybrid", "fused"])
def test_model_matches_float64(backend, tuned):
    got = loss_and_gradients(backend, torch.float32)
    want = loss_and_gradients("reference", torch.float64)
    for g, w in zip(got, want, strict=True):
        # Gradients that cancel exactly (the k bias under softmax) are compared on the scale of the parameters' others.
        assert (g.double() - w).norm() <= 1e-5 * w.norm() + 1e-8
