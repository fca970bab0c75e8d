import copy

import pytest
import torch

from model.config import GeneratorConfig
from model.injection import eject, inject, pinned
from model.placement import decoder_layers, place
from tests.model import parts

ALL_TYPES = "q,k,v,o,gate,up,down"


@pytest.mark.parametrize("name", parts.DECODERS)
def test_without_weights_the_llm_is_bit_identical(name):
    torch.manual_seed(0)
    llm, ids = parts.decoder(name), torch.randint(1, parts.VOCABULARY, (3, 9))
    before, keys = llm(input_ids=ids).logits, list(llm.state_dict())
    inject(llm, place(llm, GeneratorConfig(rank=4, every=2)))
    assert torch.equal(llm(input_ids=ids).logits, before)
    assert list(llm.state_dict()) == keys
    eject(llm)
    assert torch.equal(llm(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", parts.DECODERS)
def test_deltas_equal_an_llm_whose_weights_hold_them(name):
    """Independent reference: add dW to copies of the weights, one copy of the LLM per sample, in fp64."""
    types = "q,k,v,o,up,down" if name == "phi" else ALL_TYPES
    model = parts.build(parts.config(types=types), name).double().eval()
    batch = parts.batch(rows=[0, 0, 1], images=[0, 1])
    batch.images = batch.images.double()
    weights = model.condition(batch).weights
    ids, mask = batch.input_ids, batch.attention_mask
    ours = model.llm(input_ids=ids, attention_mask=mask, perceptual_weights=weights.for_rows(batch.rows)).logits
    for row, sample in enumerate([0, 0, 1]):
        plain = copy.deepcopy(model.llm)
        eject(plain)
        for site in weights.placement.sites:
            linear = decoder_layers(plain)[site.layer].get_submodule(site.module)
            linear.weight.data += weights.scale * (weights.a[site][sample] @ weights.b[site]).T
        reference = plain(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(ours[row], reference, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(reference, model.llm(input_ids=ids[row : row + 1]).logits[0], atol=1e-3)


def test_m_is_a_path_parallel_to_the_mlp():
    model = parts.build(parts.config(types="m")).double().eval()
    batch = parts.batch(rows=[0], images=[0])
    batch.images = batch.images.double()
    weights = model.condition(batch).weights.for_rows(batch.rows)
    plain = copy.deepcopy(model.llm)
    eject(plain)
    for site in weights.placement.sites:
        mlp, delta = decoder_layers(plain)[site.layer].mlp, weights.scale * weights.a[site][0] @ weights.b[site]
        forward = mlp.forward
        mlp.forward = lambda x, forward=forward, delta=delta: forward(x) + x @ delta
    ours = model.llm(input_ids=batch.input_ids, perceptual_weights=weights).logits
    torch.testing.assert_close(ours, plain(input_ids=batch.input_ids).logits, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = parts.build(parts.config()).train()
        if checkpointing:
            model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(parts.batch(rows=[0, 1, 1], images=[0, 1])).loss_sum.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]["connector.generator.stacks.0.queries"].abs().sum() > 0
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_pinned_weights_hold_inside_the_block_only():
    model = parts.build(parts.config()).eval()
    batch = parts.batch(rows=[0], images=[0])
    plain = model.llm(input_ids=batch.input_ids).logits
    weights = model.condition(batch).weights.for_rows(batch.rows)
    with torch.no_grad(), pinned(model.llm, weights):
        inside = model.llm(input_ids=batch.input_ids).logits
    assert torch.equal(inside, model.llm(input_ids=batch.input_ids, perceptual_weights=weights).logits)
    assert torch.equal(model.llm(input_ids=batch.input_ids).logits, plain)
    assert not torch.equal(inside, plain)


def test_injecting_twice_is_refused():
    llm = parts.decoder()
    placement = place(llm, GeneratorConfig(rank=4, every=2))
    inject(llm, placement)
    with pytest.raises(ValueError, match="already injected"):
        inject(llm, placement)
