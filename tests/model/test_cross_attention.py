"""`crossattn`: the LLM itself at the start; each row sees its own images, padded, packed, recomputed and generated."""

import pytest
import torch

from model.connectors import CrossAttentionConnector
from model.decoder.cross_attention import attach_blocks
from tests.model import parts


def model_of(llm="llama-gqa", gate=0.7):
    model = parts.build(parts.config("crossattn"), llm=llm)
    assert isinstance(model.connector, CrossAttentionConnector)
    torch.manual_seed(1)
    for block in model.connector.blocks:
        torch.nn.init.normal_(block.key_value.weight, std=0.5)
        block.gate.data.fill_(gate)
    return model.eval()


def hidden_of(model, batch, packed=None):
    model.pack_tokens = packed
    conditioning = model.condition(batch)
    packing = model._packing(batch, conditioning) if packed else None
    inputs = model.inputs(batch, conditioning, packing)
    out = model.llm.get_decoder()(**inputs.keywords, use_cache=False).last_hidden_state
    return out.flatten(0, 1)[inputs.text]


@pytest.mark.parametrize("llm", parts.DECODERS)
def test_an_untrained_model_is_the_llm_itself(llm):
    model = model_of(llm, gate=0.0)
    batch = parts.batch(rows=[0, 1], images=[0, 1])
    plain = model.llm.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert torch.equal(hidden_of(model, batch), plain)
    with pytest.raises(ValueError, match="already"):
        attach_blocks(model.llm, [])
    loss = model.train()(batch).loss_sum
    loss.backward()
    assert all(block.gate.grad.abs() > 0 for block in model.connector.blocks)  # the rest follows once it has opened


@torch.no_grad()
def test_a_row_sees_the_images_of_its_sample_and_no_others():
    """By a reference in which every row stands alone and attention is written out."""
    model = model_of()
    batch = parts.batch(rows=[0, 1, 2, 2], images=[0, 0, 2])
    found = hidden_of(model, batch)
    features = model.connector.features(model.connector.normalized(model.encode(batch.images)))
    for row, images in enumerate(([0, 1], [], [2], [2])):
        looks = [torch.cat([features[i] for i in images])] if images else []
        handles = []
        for block in model.connector.blocks:

            def look(module, args, kwargs, block=block, looks=looks):
                hidden = args[0]
                for keys in looks:
                    q = block.query(block.norm(hidden))[0].view(-1, block.heads, 8)
                    k, v = (x.reshape(-1, block.heads, 8) for x in block.key_value(keys).chunk(2, dim=-1))
                    weights = (torch.einsum("lhd,khd->hlk", q, k) / 8**0.5).softmax(-1)
                    mixed = torch.einsum("hlk,khd->lhd", weights, v).flatten(1)
                    hidden = hidden + torch.tanh(block.gate) * block.out(mixed)[None]
                return (hidden, *args[1:]), kwargs

            layer = model.llm.get_decoder().layers[block.index]
            handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
        expected = model.llm.get_decoder()(input_ids=batch.input_ids[row : row + 1]).last_hidden_state[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
        for handle in handles:
            handle.remove()
    assert not torch.allclose(found[2, 3:], found[3, 3:])  # other text, the same image


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_and_recomputation_change_nothing(checkpointing):
    batch = parts.batch(rows=[0, 1, 2, 2], images=[0, 0, 2])
    batch.attention_mask[1, 4:] = batch.attention_mask[3, 5:] = 0
    batch.labels[1, 4:] = batch.labels[3, 5:] = -100
    results = []
    for packed in (None, 12):
        model = model_of().train()
        model.pack_tokens = packed
        if checkpointing and packed:
            model.checkpoint_layers()
        out = model(batch)
        out.loss_sum.backward()
        results.append((out.loss_sum, [p.grad for p in model.connector.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_batch_without_images_gives_every_parameter_a_zero_gradient():
    model = model_of().train()
    model.llm.requires_grad_(False)
    out = model(parts.batch(rows=[0, 0], images=[0], image_weight=[0.0]))
    out.loss_sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_generation_with_a_cache_is_the_whole_forward():
    model = model_of()
    batch = parts.batch(rows=[0, 1, 2], images=[0, 0, 2])
    new = model.generate(batch, 4, pad_token_id=0, answer_end=[63])
    for length in range(new.shape[1]):
        longer = parts.batch(rows=[0, 1, 2], images=[0, 0, 2])
        longer.input_ids = torch.cat([batch.input_ids, new[:, :length]], dim=1)
        longer.attention_mask = torch.ones_like(longer.input_ids)
        with torch.no_grad():
            logits = hidden_of(model, longer)[:, -1] @ model.llm.lm_head.weight.T
        going_on = (new[:, :length] != 63).all(1)
        assert torch.equal(logits.argmax(-1)[going_on], new[going_on, length])
    # Beams of a row see its images.
    model.generate(batch, 3, pad_token_id=0, answer_end=[63], num_beams=2)


def test_its_flops_are_those_of_its_products():
    connector = model_of().connector
    patches, hidden, width = 4, 32, 24
    assert len(connector.blocks) == 2 and connector.visual_tokens == 0 and connector.first_layer == 1
    assert connector.flops() == 2 * 2 * patches * width * 2 * hidden
    assert connector.decoder_flops() == 2 * (2 * 2 * hidden * hidden + 4 * patches * hidden)
