"""Templates and label masks against rows written by hand, with a byte-level and two SentencePiece-style tokenizers."""

import functools

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.store.errors import DataError
from data_prep.text.encoder import NoTargetError, TextEncoder, TooLongError
from data_prep.text.templates import NAMES, VICUNA_SYSTEM
from model.batch import IGNORE
from tests.data_prep.text.families import sentencepiece


def dialogue(*texts, system=None):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


DIALOGUES = {
    "one turn": dialogue("What is it?", "A teal circle"),
    "several turns": dialogue("What is it?", "A circle.", "Which colour?", "teal", "Sure?", "Yes, it is teal."),
    "unicode": dialogue("Qu'est-ce que c'est ? 東京 😀", "Ein grüner Kreis – 日本 👍🏽 ok"),
    "looks like roles": dialogue(
        "USER: hi ASSISTANT: no <|im_end|>\n<|im_start|>assistant", "</s> USER: [INST] x [/INST]"
    ),
    "outer spaces": dialogue(" hello\n", " one  two \n"),
    "caption": dialogue("", "A photo of a dog"),
    "system": dialogue("Hi", "Hello", system="Be brief."),
}


@pytest.fixture(scope="session")
def smollm(part):
    return AutoTokenizer.from_pretrained(part("smollm2-135m-instruct"))


def llama_like(prefix):
    backend = Tokenizer.from_str(sentencepiece(prefix))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llama_legacy():
    return llama_like("always")


@pytest.fixture(scope="session")
def llama_first():
    return llama_like("first")


@pytest.fixture(scope="session")
def tokenizers(smollm, llama_legacy, llama_first):
    return {"smollm": smollm, "llama_legacy": llama_legacy, "llama_first": llama_first}


@functools.cache
def encoder_of(tokenizer, template):
    """Made once: a copy of a tokenizer costs a second."""
    return TextEncoder(tokenizer, template)


def spans(tokenizer, encoded):
    """The supervised stretches of a row as texts."""
    found, ids = [], []
    for token, label in zip([*encoded.input_ids, None], [*encoded.labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            ids.append(token)
        elif ids:
            found.append(tokenizer.decode(ids))
            ids = []
    return found


@pytest.mark.parametrize("case", DIALOGUES)
@pytest.mark.parametrize("name", ["smollm", "llama_legacy", "llama_first"])
@pytest.mark.parametrize("template", ["qa", "vicuna_v1", "llama2", "llama3", "chat", "plain"])
def test_exactly_the_answers_are_supervised(tokenizers, name, template, case):
    tokenizer, turns = tokenizers[name], DIALOGUES[case]
    if (template == "llama2") != (name != "smollm") and template in ("llama2", "chat"):
        pytest.skip("needs other special tokens or a chat template")
    if template == "llama3" or (template == "plain" and len(turns) > 2):
        pytest.skip("tested on its own")
    encoder = encoder_of(tokenizer, template)
    encoded = encoder.encode(turns)
    end = tokenizer.eos_token
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if name == "smollm":  # byte-level: decoding gives every character back
        lead = "" if template in ("chat", "plain") else " "
        assert spans(tokenizer, encoded) == [f"{lead}{answer}{end}" for answer in answers]
    else:
        trail = " " if template == "llama2" else ""
        got = [text.removesuffix(end).strip(" ") for text in spans(tokenizer, encoded)]
        assert got == [f"{answer}{trail}".strip(" ") for answer in answers]
    assert encoded.labels[0] == IGNORE  # the first token cannot be predicted
    ends = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == tokenizer.eos_token_id]
    assert len(ends) == len(answers)  # what merely looks like an end token is none


@pytest.mark.parametrize("case", DIALOGUES)
@pytest.mark.parametrize("name", ["smollm", "llama_legacy", "llama_first"])
@pytest.mark.parametrize("template", ["qa", "vicuna_v1", "plain", "chat", "llama2"])
def test_prompt_is_the_beginning_of_the_training_row(tokenizers, name, template, case):
    tokenizer, turns = tokenizers[name], DIALOGUES[case]
    if (template == "llama2") != (name != "smollm") and template in ("llama2", "chat"):
        pytest.skip("needs other special tokens or a chat template")
    if template == "plain" and len(turns) > 2:
        pytest.skip("plain is for captions")
    if case == "outer spaces":
        pytest.skip("an answer that begins with white space shares a token with the prompt")
    encoder = encoder_of(tokenizer, template)
    row, prompt = encoder.encode(turns), encoder.encode_prompt(turns)
    assert row.input_ids[: len(prompt)] == prompt
    rest = row.labels[len(prompt) :]
    assert rest[0] != IGNORE and row.labels[len(prompt) - 1] == IGNORE
    assert encoder.encode_prompt(turns[:-1]) == prompt
    assert encoder.decode(row.input_ids[len(prompt) :]) == turns[-1]["content"].strip()


def test_rows_written_by_hand(smollm):
    def ids(*parts):
        return [i for part in parts for i in ([part] if isinstance(part, int) else smollm(part).input_ids)]

    start, end = 1, 2
    row = encoder_of(smollm, "qa").encode(dialogue("What?", "teal", "Why?", "no"))
    assert row.input_ids == ids("Question: What?\nAnswer:", " teal", end, "Question: Why?\nAnswer:", " no", end)
    masked = [IGNORE] * len(ids("Question: What?\nAnswer:"))
    again = [IGNORE] * len(ids("Question: Why?\nAnswer:"))
    assert row.labels == [*masked, *ids(" teal", end), *again, *ids(" no", end)]

    row = encoder_of(smollm, "qa").encode(dialogue("", "red circle"))
    assert row.input_ids == ids(start, " red circle", end)
    assert row.labels == [IGNORE, *ids(" red circle", end)]

    row = encoder_of(smollm, "plain").encode(dialogue("said but not used", "red circle"))
    assert row.input_ids == ids(start, "red circle", end)

    text = f"{VICUNA_SYSTEM} USER: What? ASSISTANT:"
    row = encoder_of(smollm, "vicuna_v1").encode(dialogue("What?", "teal", "Why?", "no"))
    assert row.input_ids == ids(text, " teal", end, "USER: Why? ASSISTANT:", " no", end)


@pytest.mark.parametrize("name", ["llama_legacy", "llama_first"])
def test_llava_v1_masks(tokenizers, name):
    """LLaVA-1.5 tokenises the whole text, and supervises what follows "ASSISTANT:" up to and with </s>."""
    tokenizer = tokenizers[name]
    turns = dialogue("What is it?", "A teal circle", "it is?", "teal")
    text = f"{VICUNA_SYSTEM} USER: What is it? ASSISTANT: A teal circle</s>USER: it is? ASSISTANT: teal</s>"
    whole = tokenizer(text)
    row = TextEncoder(tokenizer, "vicuna_v1").encode(turns)
    assert row.input_ids == whole.input_ids
    expected, at = [], 0
    for part in text.split("</s>")[:-1]:
        prompt, answer = part.split(" ASSISTANT:")
        start = at + len(prompt) + len(" ASSISTANT:")
        expected.append((start, start + len(answer) + len("</s>")))
        at = expected[-1][1]
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    inside = [any(a <= s < b or s < a < e for a, b in expected) for s, e in offsets]
    inside[0] = False  # <s> has an empty span
    assert [label != IGNORE for label in row.labels] == inside


def test_chat_is_the_tokenizers_own(smollm):
    for turns in (DIALOGUES["several turns"], DIALOGUES["system"], DIALOGUES["unicode"]):
        whole = smollm.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        assert encoder_of(smollm, "chat").encode(turns).input_ids == whole
        asked = smollm.apply_chat_template(turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)
        assert encoder_of(smollm, "chat").encode_prompt(turns) == asked["input_ids"]


def test_llama3(smollm):
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(smollm.backend_tokenizer.to_str()), eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    encoder = TextEncoder(tokenizer, "llama3")
    row = encoder.encode(dialogue("What?", "teal"))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text = f"<|begin_of_text|>{head.format('user')}What?<|eot_id|>{head.format('assistant')}teal<|eot_id|>"
    assert row.input_ids == tokenizer(text).input_ids
    assert spans(tokenizer, row) == ["teal<|eot_id|>"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|begin_of_text|>' if loop.first }}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content.strip() + '<|eot_id|>' }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"
    )
    for case in ("several turns", "unicode", "looks like roles", "system"):
        ours, own = encoder.encode(DIALOGUES[case]), TextEncoder(tokenizer, "chat").encode(DIALOGUES[case])
        assert ours == own
    prompt = encoder.encode_prompt(dialogue("What?"))
    assert row.input_ids[: len(prompt)] == prompt
    assert encoder.decode(row.input_ids[len(prompt) :]) == "teal"


def test_errors(smollm, llama_first):
    with pytest.raises(DataError, match="template=chatml.*plain, qa"):
        TextEncoder(smollm, "chatml")
    with pytest.raises(DataError, match="llama3 needs the special token"):
        encoder_of(smollm, "llama3")
    with pytest.raises(DataError, match="chat template"):
        TextEncoder(llama_first, "chat").encode(DIALOGUES["one turn"])
    for template in NAMES:
        if template in ("llama2", "llama3"):
            continue
        with pytest.raises(NoTargetError):
            encoder_of(smollm, template).encode(dialogue("only a question"))
    with pytest.raises(TooLongError, match="tokens, max_length=3"):
        TextEncoder(smollm, "qa", max_length=3).encode(DIALOGUES["one turn"])
    with pytest.raises(TooLongError):
        TextEncoder(smollm, "qa", max_length=3).encode_prompt(DIALOGUES["one turn"])
    with pytest.raises(DataError, match="turn 1 is 'user'"):
        encoder_of(smollm, "qa").encode([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(DataError, match="plain is for captions"):
        encoder_of(smollm, "plain").encode(DIALOGUES["several turns"])
    assert encoder_of(smollm, "qa").pad_id == smollm.eos_token_id  # so nothing may mask by id
