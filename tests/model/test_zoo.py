"""A few families of the zoo (`make zoo` tries all), and what is found out about heads, masks and norms on its own."""

import pytest
import torch
from torch import nn

from benchmarks import zoo
from model.config import GeneratorConfig, LLMConfig
from model.decoder.head import HeadTransform, head_transform
from model.decoder.packing import check_packing
from model.generator.placement import place
from model.generator.weights import base_norms
from model.loading import ModelError, build_llm


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost such small models more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["granite", "gpt_oss", "opt"])
def test_a_family_passes_every_check(name):
    entry = zoo.examine(name)
    assert entry.checks == dict.fromkeys(zoo.CHECKS, "ok"), entry


def test_what_a_family_cannot_do_is_refused_by_the_key():
    with pytest.raises(ModelError, match="engine.gradient_checkpointing: JetMoeForCausalLM .* set it to false"):
        zoo.check_checkpointing("jetmoe", ("m",))
    sinks = LLMConfig(path="-", architecture=zoo.tiny_config("gpt_oss").to_dict())
    with pytest.raises(ModelError, match="llm.attn_implementation=sdpa: GptOssForCausalLM .* set .*=eager"):
        build_llm(sinks, torch.float32, meta=True)


@pytest.mark.parametrize("name", zoo.ENCODERS[:4])
def test_an_encoder_works_or_is_refused_in_words(name):
    assert zoo.check_encoder(name).startswith("refused: " if name == "siglip2_vision_model" else "")
    assert "FAULT" not in zoo.check_encoder(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", HeadTransform()),
        ("granite", HeadTransform(scale=1 / 8)),
        ("cohere2", HeadTransform(scale=0.0625)),
        ("gemma2", HeadTransform(softcap=3.0)),
        ("minicpm3", HeadTransform(input_scale=8.0)),  # hidden / (hidden_size / dim_model_base), 32 / 256
    ],
)
def test_what_stands_around_the_head_is_found(name, expected):
    llm = zoo.decoder(name)
    found = head_transform(llm)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5) and found.softcap == expected.softcap
    assert head_transform(llm.to("meta")) == found  # nothing is computed, and what was replaced is back


def test_logits_made_otherwise_are_refused():
    class Odd(type(zoo.decoder("llama"))):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.relu()
            return out

    llm = zoo.decoder("llama")
    llm.__class__ = Odd
    with pytest.raises(ModelError, match="Odd computes logits in a way that is not known"):
        head_transform(llm)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "starcoder2", "mixtral", "gpt_oss", "qwen2_moe"])
def test_every_mlp_has_a_norm(name):
    llm = zoo.decoder(name)
    placement = place(llm, GeneratorConfig(types="m", every=2, rank=4))
    norms = base_norms(llm, placement)
    for site, norm in norms.items():
        mlp = llm.get_decoder().layers[site.layer].get_submodule(site.module)
        down = {n: p for n, p in mlp.named_parameters() if "down_proj" in n or n.startswith(("c_proj.w", "dense_4h"))}
        square = sum(p.detach().square().sum() / (len(p) if p.dim() == 3 else 1) for p in down.values() if p.dim() > 1)
        if name != "gpt_oss":  # its down_proj_bias is a matrix as well
            assert norm == pytest.approx(float(square) ** 0.5, rel=1e-4)
        assert norm > 0


def test_a_state_along_the_row_refuses_packing():
    llm = zoo.decoder("llama")
    check_packing(llm)
    llm.model.layers[1].self_attn.short_conv = nn.Conv1d(4, 4, 3)
    with pytest.raises(ModelError, match=r"llm\.pack_tokens: LlamaForCausalLM has layers of kind Conv1d.*=null"):
        check_packing(llm)
