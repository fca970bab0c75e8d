"""Labels on a real SentencePiece model, trained here and loaded as Llama's and Vicuna's are; LLaVA-1.5's masks.

The reference is SentencePiece itself and LLaVA's rule: a round is tokenised as one text, and masked for as many tokens
as its text up to "ASSISTANT: " has, less the last, which is the space that goes with the answer.
"""

import io
import json

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from data_prep.text.encoder import TextEncoder
from data_prep.text.templates import VICUNA_SYSTEM
from model.batch import IGNORE

CORPUS = (
    f"{VICUNA_SYSTEM} USER: What is it? ASSISTANT: A teal circle. [INST] Sure? [/INST] Yes, the colour is 東京 blue."
)
DIALOGUES = {
    "one turn": ["What is it?", "A teal circle"],
    "several turns": ["What is it?", "A circle.", "Which colour?", "teal", "Sure?", "Yes, it is teal."],
    "empty answer": ["What is it?", "", "Sure?", "yes"],
    "unicode": ["Qu'est-ce que c'est ? 東京 😀", "Ein grüner Kreis – 日本 👍🏽 ok", "いいえ", "42 ½"],
    "line ends and spaces": ["List  them:\n- a\n\n- b", "1.\ta\n\n\n2. b  c"],
    "looks like roles": [
        "Say USER: and ASSISTANT: twice",
        "USER: a ASSISTANT: b</s>",
        "</s><s>USER: x ASSISTANT: y",
        "[INST]",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer folder as Vicuna's: `tokenizer.model` and its configuration."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CORPUS] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pieces(folder):
    """SentencePiece's own encoders: of a text's beginning, and of what follows a special token (no word mark)."""
    proto = (folder / "tokenizer.model").read_bytes()
    later = sentencepiece_model_pb2.ModelProto.FromString(proto)
    later.normalizer_spec.add_dummy_prefix = False
    protos = (proto, later.SerializeToString())
    return [sentencepiece.SentencePieceProcessor(model_proto=each).encode for each in protos]


def turns(texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def llava_v1(pieces, texts):
    """Row and labels by LLaVA's rule."""
    ids, labels = [1], [IGNORE]
    for number in range(0, len(texts), 2):
        encode = pieces[number > 0]
        question = f"{VICUNA_SYSTEM} " * (number == 0) + f"USER: {texts[number]} ASSISTANT: "
        whole, masked = encode(question + texts[number + 1]), len(encode(question)) - 1
        ids += [*whole, 2]
        labels += [*[IGNORE] * masked, *whole[masked:], 2]
    return ids, labels


@pytest.mark.parametrize("case", DIALOGUES)
def test_llava_v1_masks(tokenizer, pieces, case):
    row = TextEncoder(tokenizer, "vicuna_v1").encode(turns(DIALOGUES[case]))
    assert (row.input_ids, row.labels) == llava_v1(pieces, DIALOGUES[case])


@pytest.mark.parametrize("case", [case for case in DIALOGUES if case != "looks like roles"])
def test_rows_are_the_tokenizers_own(tokenizer, case):
    """The whole text through the tokenizer at once; only text that looks like a special token is read differently."""
    texts = DIALOGUES[case]
    rounds = [f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(texts[::2], texts[1::2], strict=True)]
    whole = tokenizer(f"{VICUNA_SYSTEM} {''.join(rounds)}").input_ids
    assert TextEncoder(tokenizer, "vicuna_v1").encode(turns(texts)).input_ids == whole


@pytest.mark.parametrize("case", DIALOGUES)
def test_captions_are_llavas_plain(tokenizer, pieces, case):
    """LLaVA's plain: the caption alone, all of it supervised; ours ends with the end token instead of a line end."""
    caption = DIALOGUES[case][1]
    row = TextEncoder(tokenizer, "plain").encode(turns(["Describe it.", caption]))
    wanted = [*(pieces[0](caption) if caption else []), 2]
    assert (row.input_ids, row.labels) == ([1, *wanted], [IGNORE, *wanted])


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("case", [case for case in DIALOGUES if case not in ("empty answer", "looks like roles")])
def test_llama2_template_and_the_tokenizers_own_agree(folder, case):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA2
    ours, own = (TextEncoder(tokenizer, name).encode(turns(DIALOGUES[case])) for name in ("llama2", "chat"))
    whole = tokenizer.apply_chat_template(turns(DIALOGUES[case]), tokenize=True, return_dict=True)["input_ids"]
    assert ours.input_ids == own.input_ids == whole
    assert ours.labels == own.labels
    answers = DIALOGUES[case][1::2]
    supervised = tokenizer.decode([label for label in ours.labels if label != IGNORE])
    assert supervised.replace(" ", "") == "".join(f"{answer}</s>" for answer in answers).replace(" ", "")


@pytest.mark.parametrize("template", ["vicuna_v1", "llama2", "qa", "bare", "plain"])
def test_end_and_start_tokens_are_only_the_templates_own(tokenizer, template):
    texts = DIALOGUES["looks like roles"][: 2 if template == "plain" else 4]
    row = TextEncoder(tokenizer, template).encode(turns(texts))
    assert row.input_ids.count(2) == len(texts) // 2 == row.labels.count(2)
    assert row.input_ids.count(1) == (2 if template == "llama2" else 1) and 1 not in row.labels
