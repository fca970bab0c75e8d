"""Packed rows against padded ones: same numbers, no leaks."""

import itertools
from random import Random

import pytest
import torch
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from model.batch import IGNORE
from model.decoder.packing import Packing
from tests.model import parts

LENGTHS = [5, 9, 1, 7, 3, 9]


def ragged(images: tuple[int, ...] = (0, 0, 3), dtype: torch.dtype = torch.float64):
    """Six dialogues of four samples, of different lengths; samples 1 and 2 have no image."""
    batch = parts.batch(rows=[0, 0, 1, 2, 3, 3], images=list(images), length=9)
    for row, length in enumerate(LENGTHS):
        batch.attention_mask[row, length:] = 0
        batch.input_ids[row, length:] = 0
        batch.labels[row, length:] = IGNORE
        batch.labels[row, :2] = IGNORE
    batch.images = batch.images.to(dtype)
    return batch


def loss_and_gradients(model, batch, pack_tokens):
    model.pack_tokens = pack_tokens
    model.zero_grad()
    output = model(batch)
    output.loss_sum.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 16) for name in parts.DECODERS), ("llama-gqa", 9), ("llama-gqa", 1000)]
)
@pytest.mark.parametrize("connector", ["vlora", "mlp", "qformer", "crossattn"])
def test_packed_equals_padded(name, connector, tokens):
    # transformers' eager attention, Gemma's default, makes NaN of wholly masked padding in fp64: its softmax is fp32.
    exact = name != "gemma2"
    dtype = torch.float64 if exact else torch.float32
    model = parts.build(parts.config(connector), name).to(dtype).eval()
    batch = ragged(dtype=dtype)
    padded, expected = loss_and_gradients(model, batch, None)
    packed, found = loss_and_gradients(model, batch, tokens)
    assert packed.n_targets == padded.n_targets > 0 and packed.positions < padded.positions
    assert packed.tokens == padded.tokens
    rtol, atol = (1e-8, 1e-10) if exact else (1e-4, 1e-4)
    torch.testing.assert_close(packed.loss_sum, padded.loss_sum, rtol=rtol, atol=atol)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_stay(attention):
    """A window shorter than the dialogues: a packed token may not look further back than a padded one."""
    model = parts.build(parts.config(), "mistral").eval()
    model.llm.config.sliding_window = 3
    model.llm.set_attn_implementation(attention)
    batch = ragged(dtype=torch.float32)
    padded, expected = loss_and_gradients(model, batch, None)
    packed, found = loss_and_gradients(model, batch, 1000)
    model.llm.config.sliding_window = None
    unlimited, _ = loss_and_gradients(model, batch, None)
    torch.testing.assert_close(packed.loss_sum, padded.loss_sum, rtol=1e-5, atol=1e-4)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4) for key in expected)
    assert not torch.allclose(unlimited.loss_sum, padded.loss_sum, rtol=1e-3)


@pytest.mark.parametrize("connector", ["vlora", "mlp"])
def test_a_secret_in_one_dialogue_cannot_be_read_from_another(connector):
    """Other text, labels and image of one sample: loss and gradient of all others stay the same to the last bit."""
    model = parts.build(parts.config(connector)).double().eval()
    model.pack_tokens = 1000
    embedded: list[torch.Tensor] = []
    model.llm.get_input_embeddings().register_forward_hook(
        lambda _, __, out: embedded.append(out) or out.retain_grad() or out
    )

    def others(secret: int):
        batch = ragged(images=(0, 2, 3))
        batch.input_ids[3, :7] = secret
        batch.images[1] = secret / 10
        batch.labels[3] = IGNORE  # the dialogue with the secret has no loss of its own here
        model.zero_grad()
        loss = model(batch).loss_sum
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.connector.named_parameters() if p.grad is not None}

    (loss, gradients), (again, gradients_again) = others(7), others(23)
    assert torch.equal(loss, again)
    assert gradients and all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    # Nothing flows back into the secret either; the other dialogues get their gradients.
    gradient = embedded[-1].grad
    if connector == "vlora":  # packed: segments stand in the order of the rows
        starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
        flat = gradient[0].abs().sum(1)
        per_row = [flat[a:b].sum().item() for a, b in zip(starts, starts[1:], strict=False)]
    else:  # the hook sees the padded text
        per_row = [row.abs().sum().item() for row in gradient]
    assert per_row[3] == 0 and all(per_row[row] > 0 for row in (0, 1, 4, 5)), per_row


def test_the_flash_path_packs_into_one_row_and_names_every_dialogue(monkeypatch):
    """FlashAttention-2 itself needs a GPU: attention in plain torch stands in for it, told only what it would be."""
    lengths = []

    def varlen(module, q, k, v, mask, dropout=0.0, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
        assert mask is None and q.shape[0] == 1 and torch.equal(kwargs["cu_seq_lens_k"], cu_seq_lens_q)
        spans = list(zip(cu_seq_lens_q.tolist(), cu_seq_lens_q.tolist()[1:], strict=False))
        lengths.append([end - start for start, end in spans])
        assert max(lengths[-1]) == max_length_q == kwargs["max_length_k"]
        out = [
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
            )
            for a, b in spans
        ]
        return torch.cat(out, 2).transpose(1, 2), None

    model = parts.build(parts.config()).double().eval()
    batch = ragged()
    padded, expected = loss_and_gradients(model, batch, None)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
    monkeypatch.setattr(model.llm.config, "_attn_implementation_internal", "flash_attention_2")
    packed, found = loss_and_gradients(model, batch, 9)
    assert lengths[0] == LENGTHS and packed.positions == sum(LENGTHS)
    torch.testing.assert_close(packed.loss_sum, padded.loss_sum, rtol=1e-8, atol=1e-10)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-10, msg=key)


def test_lengths_for_flash_attention_are_those_transformers_would_find():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    packing = Packing.of(mask, None)
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(packing.position_ids)
    found = packing.flash_keywords()
    assert found["cu_seq_lens_q"].tolist() == starts.tolist() and found["cu_seq_lens_q"].dtype == starts.dtype
    assert found["max_length_q"] == longest


def test_layout():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    packing = Packing.of(mask, 4)
    assert packing.source.tolist() == [[0, 1, 4, 5], [6, 7, 8, 12]]
    assert packing.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert packing.offsets == (0, 2, 4, 7, 8) and packing.row == (0, 1, 2, 4)
    short = Packing.of(mask, 3)
    assert short.position_ids.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 2], [0, 0, 0]]
    assert short.row == (0, -1, 1, -1, 2, 4, -1)
    assert Packing.of(torch.zeros(2, 3), 4).source.shape == (1, 1)  # a rank whose dialogues were all dropped
    assert Packing.of(mask, None).source.shape == (1, 8)


def test_rows_are_as_few_as_the_bound_allows_and_as_even_as_their_order_allows():
    def layout(lengths, bound):
        mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, length in zip(mask, lengths, strict=True):
            row[:length] = 1
        return Packing.of(mask, bound).source.shape

    def shortest(lengths, rows):
        """The longest of so many rows, over all ways to cut."""
        cuts = itertools.combinations(range(1, len(lengths)), rows - 1)
        ends = ([0, *cut, len(lengths)] for cut in cuts)
        return min(max(sum(lengths[a:b]) for a, b in itertools.pairwise(end)) for end in ends)

    random = Random(0)
    for _ in range(50):
        lengths = [random.randint(1, 12) for _ in range(random.randint(1, 9))]
        for bound in (1, 12, 20, 200):
            rows, width = layout(lengths, bound)
            assert width == shortest(lengths, rows) and (width <= bound or width == max(lengths))
            assert rows == 1 or shortest(lengths, rows - 1) > bound  # one row less would be too long
