"""Norms, rotary embedding and loss of `llm.kernels`: numbers, and which modules are swapped.

Liger's and apex's own kernels run on GPUs only. Here stand-ins with their signatures, in plain torch, show that the
right arguments reach them; the test marked `gpu` runs the real ones.
"""

import copy
import importlib
import sys
import types

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama

from common.errors import UserError
from model.decoder.injection import eject
from model.decoder.norms import norm_offset, resolve_kernels, use_kernels
from tests.model import parts

NORMS = {"llama": 9, "llama-gqa": 9, "qwen2": 9, "qwen3": 17, "mistral": 9, "gemma2": 17, "phi": 0}


def liger_rms_norm(X, W, eps, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True):
    assert not in_place and casting_mode == ("gemma" if offset else "llama")
    x = X.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * (offset + W.float())).to(X.dtype)


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return rotate(q), rotate(k)


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
):  # fmt: skip
    logits = nn.functional.linear(input, weight, bias).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, target, reduction=reduction)


@pytest.fixture
def stand_ins(monkeypatch):
    """`liger_kernel` and NVIDIA `apex`, as far as we call them; counts calls by name."""
    calls: dict[str, int] = {}

    def counted(function):
        def call(*args, **kwargs):
            calls[function.__name__] = calls.get(function.__name__, 0) + 1
            return function(*args, **kwargs)

        return call

    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return nn.functional.rms_norm(input, normalized_shape, weight, eps)

    functional = types.ModuleType("liger_kernel.transformers.functional")
    for function in (liger_rms_norm, liger_rope, liger_fused_linear_cross_entropy):
        setattr(functional, function.__name__, counted(function))
    apex = types.ModuleType("apex.normalization.fused_layer_norm")
    apex.fused_rms_norm_affine = counted(fused_rms_norm_affine)
    for module in (functional, apex):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # Rotary functions are replaced in transformers' modules: give them back.
    for family in {name.partition("-")[0] for name in parts.DECODERS}:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)
    return calls


@pytest.mark.parametrize("name", parts.DECODERS)
@pytest.mark.parametrize("kernels", ["transformers", "torch", "liger", "apex"])
def test_every_decoder_computes_what_it_did(name, kernels, stand_ins):
    model = parts.build(parts.config(), name).eval()
    for key, parameter in model.llm.named_parameters():  # so that x w and x (1 + w) differ
        if "norm" in key:
            nn.init.normal_(parameter, std=0.5)
    swapped = copy.deepcopy(model)
    batch = parts.batch(rows=[0, 1, 1], images=[0, 1])
    losses, gradients = [], []
    for m in (model, swapped):
        if m is swapped:
            found = use_kernels(swapped.llm, kernels)
        loss = m(batch).loss_sum
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert found["norms"] == (0 if kernels == "transformers" else NORMS[name])
    assert (found["rotary"], found["loss"]) == ((1, 1) if kernels == "liger" else (0, 0))
    assert bool(stand_ins) == (kernels in ("liger", "apex") and (kernels == "liger" or NORMS[name] > 0))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-4, msg=key)
    assert list(swapped.state_dict()) == list(model.state_dict())
    eject(swapped.llm)  # the deltas go, the kernels stay
    assert sum("Kernel" in type(m).__name__ for m in swapped.modules()) == found["norms"]


def test_the_formula_of_a_norm_is_found_by_running_it():
    assert norm_offset(modeling_llama.LlamaRMSNorm) == 0
    assert norm_offset(Gemma2RMSNorm) == 1

    class HalfRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    class BareRMSNorm(nn.Module):
        pass

    assert norm_offset(HalfRMSNorm) is None and norm_offset(BareRMSNorm) is None


@pytest.mark.parametrize(("cls", "offset"), [(modeling_llama.LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_torchs_norm_equals_the_module(cls, offset, dtype, tolerance):
    """fp32: to rounding. bf16: Llama's module rounds twice, one kernel once; the fp64 formula is the judge."""
    from model.decoder.norms import _torch_norm

    torch.manual_seed(0)
    module = cls(64, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight, std=0.5)
    x, up = torch.randn(2, 37, 64, dtype=dtype) * 30, torch.randn(2, 37, 64, dtype=dtype)

    def run(function):
        leaf, weight = x.clone().requires_grad_(), module.weight
        weight.grad = None
        out = function(leaf, weight)
        out.backward(up.to(out.dtype))
        return [t.double() for t in (out.detach(), leaf.grad, weight.grad)]

    def exact(leaf, weight):
        wide = leaf.double()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (weight.double() + offset)

    theirs, ours = run(lambda t, _: module(t)), run(lambda t, w: _torch_norm(t, w, offset, 1e-5))
    for a, b, reference in zip(ours, theirs, run(exact), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
        assert (a - reference).norm() <= max(1.01 * (b - reference).norm().item(), 1e-6 * reference.norm().item())


def test_what_is_chosen_and_what_is_refused(monkeypatch):
    assert resolve_kernels("auto", cuda=False) == "transformers"
    assert resolve_kernels("torch", cuda=False) == "torch"
    for missing in ("liger", "apex"):
        with pytest.raises(UserError, match=f"llm.kernels={missing}: .* not installed.*llm.kernels=auto"):
            resolve_kernels(missing, cuda=True)
    with pytest.raises(UserError, match="choose one of auto, transformers"):
        resolve_kernels("ligr", cuda=True)
    present = {"liger_kernel", "apex", "apex.optimizers"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True if name in present else None)
    assert resolve_kernels("auto", cuda=True) == "liger"
    with pytest.raises(UserError, match="NVIDIA GPUs only"):
        resolve_kernels("liger", cuda=False)
    present.remove("liger_kernel")
    assert resolve_kernels("auto", cuda=True) == "apex"
    present.remove("apex.optimizers")  # the unrelated package of that name
    assert resolve_kernels("auto", cuda=True) == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gemma2"])
def test_ligers_own_kernels_on_a_gpu(name):
    pytest.importorskip("liger_kernel")
    model = parts.build(parts.config(), name).cuda().eval()
    batch = parts.batch(rows=[0, 1, 1], images=[0, 1]).to("cuda")
    expected = model(batch).loss_sum
    use_kernels(model.llm, "liger")
    torch.testing.assert_close(model(batch).loss_sum, expected, rtol=1e-4, atol=1e-4)
