"""`mlp` and `qformer` give the LLM LLaVA's sequence: visual tokens at the image's place, in training and generation.

The reference builds that sequence row by row, as LLaVA's `prepare_inputs_labels_for_multimodal` does, from rows of ids
in which -200 stands for an image.
"""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_prep.parts.tiny_llm import build_tokenizer
from data_prep.store.pixels import PixelPreprocessor
from data_prep.store.sample import Sample
from data_prep.text.encoder import TextEncoder
from model.batch import IGNORE
from model.vision import VisionEncoder
from model.vlm import assemble
from tests.model import hub, parts
from tests.train.world import dialogue, picture
from train.data.collate import Text, collate, encode_sample

IMAGE = -200
PIXELS = PixelPreprocessor("resize", 28, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RED, BLUE = picture((200, 10, 10)), picture((10, 10, 200))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(hub.sentencepiece_model())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | hub.SPECIAL))
    return AutoTokenizer.from_pretrained(folder)


def model_of(connector):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=320, pad_token_id=0, **sizes))
    config = parts.config(connector)
    return assemble(config, llm, VisionEncoder(parts.vision(), config.vision)).eval()


def samples(kind):
    """Of one kind: an image, two, none, one with several turns; of unequal lengths."""
    if kind == "caption":
        return [
            Sample("a", [RED], [dialogue("", "a red square")], "s"),
            Sample("b", [BLUE], [dialogue("", "blue")], "s"),
        ]
    turns = dialogue("what color is the shape?", "red") + dialogue("is there a blue shape?", "no")
    return [
        Sample("a", [RED], [turns], "s"),
        Sample("b", [RED, BLUE], [dialogue("is there a blue shape?", "yes")], "s"),
        Sample("c", [], [dialogue("What is it?", "A teal circle.")], "s"),
        Sample("d", [BLUE], [dialogue("<image> is it red?", "no"), dialogue("black?", "no")], "s"),
    ]


def batch_of(kind, tokenizer, prompts=False):
    encoder = TextEncoder(tokenizer, "plain" if kind == "caption" else "vicuna_v1")
    pieces = []
    for sample in samples(kind):
        piece, _ = encode_sample(Text(encoder), sample, list(range(len(sample.conversations))), sample.id)
        if prompts:
            piece.rows = [encoder.prompt(talk, len(sample.images)) for talk in sample.conversations]
        pieces.append(piece)
    return collate(pieces, PIXELS, encoder.pad_id, left=prompts), pieces


def llava(model, batch, pieces):
    """Embeddings and labels of each row, and what the LLM makes of them, padded on the right."""
    visual = model.condition(batch).tokens
    owners = [(row, n) for n, piece in enumerate(pieces) for row in piece.rows]
    embed = model.llm.get_input_embeddings()
    embeds, labels, where = [], [], []
    for row, owner in owners:
        images = iter(visual[[i for i, s in enumerate(batch.image_to_sample.tolist()) if s == owner]])
        ids, targets = list(row.input_ids), list(row.labels)
        for place in sorted(row.image_at, reverse=True):
            ids.insert(place, IMAGE)
            targets.insert(place, IGNORE)
        found, wanted = [], []
        for token, target in zip(ids, targets, strict=True):
            found.append(next(images) if token == IMAGE else embed(torch.tensor([token])))
            wanted += [IGNORE] * len(found[-1]) if token == IMAGE else [target]
        embeds.append(torch.cat(found))
        labels.append(torch.tensor(wanted))
        where.append(torch.cat([torch.full((len(e),), t != IMAGE) for e, t in zip(found, ids, strict=True)]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(e)) for e in embeds], batch_first=True).long()
    out = model.llm.model(
        inputs_embeds=pad(embeds, batch_first=True), attention_mask=mask, position_ids=torch.arange(mask.shape[1])[None]
    )
    logits = out.last_hidden_state @ model.llm.lm_head.weight.T
    labels = pad(labels, batch_first=True, padding_value=IGNORE)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return embeds, [row[: len(at)][at] for row, at in zip(logits, where, strict=True)], loss


@pytest.mark.parametrize("packed", [None, 64])
@pytest.mark.parametrize("kind", ["caption", "conversation"])
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_logits_and_loss_are_llavas(connector, kind, packed, tokenizer):
    model = model_of(connector)
    batch, pieces = batch_of(kind, tokenizer)
    _, expected, loss = llava(model, batch, pieces)
    model.pack_tokens = packed
    out = model(batch)
    assert out.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    trained = list(model.connector.projector.parameters())
    gradients = (torch.autograd.grad(value, trained) for value in (out.loss_sum, loss))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
    with torch.no_grad():
        conditioning = model.condition(batch)
        packing = model._packing(batch, conditioning) if packed else None
        inputs = model.inputs(batch, conditioning, packing)
        hidden = model.llm.get_decoder()(**inputs.keywords, use_cache=False).last_hidden_state.flatten(0, 1)
    for number, (row, found) in enumerate(zip((row for piece in pieces for row in piece.rows), expected, strict=True)):
        logits = hidden[inputs.text[number, : len(row.input_ids)]] @ model.llm.lm_head.weight.T
        assert (logits - found).norm() <= 1e-5 * found.norm()


def test_images_stand_where_llava_puts_them(tokenizer):
    caption, talk = (TextEncoder(tokenizer, name) for name in ("plain", "vicuna_v1"))
    row = caption.encode(dialogue("", "a red square"), 1)
    assert row.image_at == (1,) and row.input_ids[0] == tokenizer.bos_token_id
    plain = talk.encode(dialogue("What is it?", "A teal circle."))
    row = talk.encode(dialogue("What is it?", "A teal circle."), 1)
    assert (row.input_ids, row.labels) == (plain.input_ids, plain.labels) and plain.image_at == ()
    assert tokenizer.decode(row.input_ids[: row.image_at[0]]).rstrip().endswith("questions. USER:")
    assert tokenizer.decode(row.input_ids[row.image_at[0] :]).lstrip().startswith("What is it? ASSISTANT: A teal")
    # The prompt of an answer begins as its row; places of the source are kept, and its marks are no text.
    assert talk.prompt(dialogue("What is it?", "A teal circle."), 2).image_at == row.image_at * 2
    two = talk.encode(dialogue("is it<image> red? or<image> black?", "no"), 2)
    cuts = [tokenizer.decode(two.input_ids[:place]).rsplit("USER:", 1)[1].strip() for place in two.image_at]
    assert cuts == ["is it", "is it red? or"] and "image" not in tokenizer.decode(two.input_ids)
    # As many marks as images, or they are what the user wrote.
    assert "<image>" in tokenizer.decode(talk.encode(dialogue("is it<image> red?", "no"), 2).input_ids)


@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_generation_continues_llavas_sequence(connector, tokenizer):
    """Left-padded prompts of several lengths and numbers of images, with a cache; the reference has none of these."""
    model = model_of(connector)
    batch, pieces = batch_of("conversation", tokenizer, prompts=True)
    embeds, _, _ = llava(model, batch, pieces)
    found = model.generate(batch, 4, pad_token_id=0, answer_end=[319])
    for row, ids in zip(embeds, found.tolist(), strict=True):
        for token in ids:
            hidden = model.llm.model(inputs_embeds=row[None]).last_hidden_state[0, -1]
            assert (hidden @ model.llm.lm_head.weight.T).argmax().item() == token
            row = torch.cat([row, model.llm.get_input_embeddings()(torch.tensor([token]))])


def test_tiles_of_an_image_stand_together(tokenizer):
    pixels = PixelPreprocessor("tiles", 28, 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), max_tiles=2)
    encoder = TextEncoder(tokenizer, "vicuna_v1")
    sample = Sample("a", [picture((9, 9, 9)), RED], [dialogue("is it<image> red<image>?", "no")], "s")
    piece, _ = encode_sample(Text(encoder), sample, [0], "a")
    batch = collate([piece], pixels, encoder.pad_id)
    first, second = piece.rows[0].image_at
    assert batch.image_at.tolist() == [[first] * 3 + [second] * 3] and first < second


def test_a_text_may_hold_the_character_that_marks_an_image():
    tokenizer = build_tokenizer(["what is it? a cat"])
    encoder = TextEncoder(tokenizer, "qa")
    talk = [{"role": "user", "content": "what \ufdd0 is it?"}, {"role": "assistant", "content": "a \ufdd0 cat"}]
    plain, row = encoder.encode(talk), encoder.encode(talk, 2)
    assert (row.input_ids, row.labels) == (plain.input_ids, plain.labels) and len(row.image_at) == 2
    assert "\ufdd0" in tokenizer.decode(row.input_ids)
