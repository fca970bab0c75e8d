"""Adapters of the LLM: against peft's own model, with images against an LLM that holds them, and what is refused."""

import pytest
import torch
from peft import PeftModel

from model.config import LoRAConfig
from model.decoder.injection import SharedInput
from model.decoder.lora import add_adapters, merge, save_adapters
from model.generator.placement import decoder_layers
from model.vlm import VisionLanguageModel
from tests.model import parts


def adapted(model: VisionLanguageModel, **settings: object) -> VisionLanguageModel:
    """The same model with adapters that are not zero."""
    torch.manual_seed(1)
    add_adapters(model.llm, LoRAConfig(**{"rank": 4, "alpha": 6.0} | settings))
    for name, parameter in model.llm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys() and ours
    return max(((ours[n] - t).abs().max() / t.abs().max()).item() for n, t in theirs.items())


@pytest.mark.parametrize(("llm", "types"), [("llama-gqa", None), ("phi", "q,v,down"), ("gemma2", "qkvo")])
def test_without_an_image_it_is_pefts_own_model(tmp_path, llm, types):
    """What is written, loaded by peft around the plain LLM: logits, and gradients of every adapter."""
    model = parts.build(parts.config(types="qkvom"), llm)
    parts.build(parts.config(), llm).llm.save_pretrained(tmp_path / "base")  # the same seed
    model = adapted(model, types=types)
    trained = {name for name, p in model.llm.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.llm.named_parameters() if ".lora_" in name}
    save_adapters(model.llm, dict(model.llm.named_parameters()), str(tmp_path / "base"), tmp_path / "lora")

    base = type(model.llm).from_pretrained(tmp_path / "base", dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, tmp_path / "lora", is_trainable=True).eval()
    ids = parts.batch(rows=[0, 1], images=[0]).input_ids
    outputs = [m(input_ids=ids).logits for m in (model.llm.eval(), reference)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs[0], parts.build(parts.config(), llm).llm(input_ids=ids).logits, atol=1e-2)
    for out in outputs:
        out.square().sum().backward()
    ours = {n: p.grad for n, p in model.llm.named_parameters() if p.requires_grad}
    theirs = {n.removeprefix("base_model.model."): p.grad for n, p in reference.named_parameters() if p.requires_grad}
    assert differences(ours, theirs) < 1e-5


@pytest.mark.parametrize("connector", ["vlora", "mlp", "qformer", "crossattn"])
@pytest.mark.parametrize(("checkpointing", "packed"), [(False, None), (True, 10)])
def test_with_images_it_is_the_llm_that_holds_the_adapters(connector, checkpointing, packed):
    """W x + delta + adapter, of all types at once: loss and the connector's gradients equal those of the merged LLM."""
    types = ["q", "k", "v", "o", "gate", "up", "down", "m"]
    config = parts.config(connector, **({"types": types} if connector == "vlora" else {}))
    model, plain = adapted(parts.build(config)), parts.build(config)
    plain.llm.load_state_dict(merge(model.llm, model.llm.state_dict(), torch.float32))
    batch = parts.batch(rows=[0, 0, 1, 2], images=[0, 1, 1])
    batch.attention_mask[1, 5:] = 0
    batch.labels[1, 5:] = -100
    gradients = []
    for each in (model, plain):
        each.vision.requires_grad_(False)
        each.train()
        each.pack_tokens = packed
        if checkpointing:
            each.checkpoint_layers()
        loss = each(batch).loss_sum
        loss.backward()
        found = {name: p.grad for name, p in each.connector.named_parameters() if p.grad is not None}
        gradients.append((loss, found))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=0)
    assert differences(gradients[0][1], gradients[1][1]) < 1e-3
    assert all(p.grad is not None for p in model.llm.parameters() if p.requires_grad)


def test_projections_that_share_their_input_stay_one_op(monkeypatch):
    calls: list[int] = []
    forward = SharedInput.forward
    monkeypatch.setattr(SharedInput, "forward", lambda self, x: calls.append(1) or forward(self, x))
    model = adapted(parts.build(parts.config(types="qkv")))
    model(parts.batch(rows=[0], images=[0]))
    assert len(calls) == 2  # one for each placed layer


def test_merging_rounds_once():
    """In bf16: fp32 factors and weights are multiplied and added in fp32."""
    model = adapted(parts.build(parts.config()).to(torch.bfloat16))
    tensors = {n: p.detach().float() if ".lora_" in n else p.detach() for n, p in model.llm.named_parameters()}
    name = "model.layers.2.mlp.down_proj"
    down, up = (tensors[f"{name}.{factor}.default.weight"].double() for factor in ("lora_A", "lora_B"))
    exact = tensors[f"{name}.base_layer.weight"].double() + 1.5 * up @ down
    merged = merge(model.llm, tensors, torch.bfloat16)[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-12).all()  # half a unit in the last place


def test_only_what_would_be_trained_is_adapted():
    model = parts.build(parts.config())
    for layer in list(decoder_layers(model.llm))[:3]:
        layer.requires_grad_(False)
    adapted(model, types="q,down")
    names = {name.rpartition(".lora_")[0] for name, p in model.llm.named_parameters() if p.requires_grad}
    assert names == {"model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"}
    assert not any(".lora_" in name for name, p in model.llm.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("llm", "settings", "message"),
    [
        ("phi", {"types": ["gate"]}, r"stage\.lora\.types=\['gate'\]: PhiForCausalLM has no such projection"),
        ("llama", {"rank": 33}, r"stage\.lora\.rank=33 is above the width of model\.layers\.0\.self_attn\.q_proj \(32"),
    ],
)
def test_adapters_that_cannot_be_are_refused(llm, settings, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(parts.build(parts.config(types="q"), llm).llm, LoRAConfig(**settings))
    frozen = parts.build(parts.config()).llm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to adapt, stage\.freeze or freeze_lower"):
        add_adapters(frozen, LoRAConfig())
