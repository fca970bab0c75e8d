"""Chat templates of 26 families: rows are the tokenizer's own, targets are what has to be generated, answers end."""

import functools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_prep.store.errors import DataError
from data_prep.text.encoder import TextEncoder
from model.batch import IGNORE
from tests.data_prep.text.families import FAMILIES

PARTS = [
    "a", "teal circle", "What is it?", " ", "\n", "\n\n", "  ", "\t", "<think>", "</think>", "/no_think", "/think",
    "<tool_response>", "</tool_response>", "[INST]", "USER: ", "<unk", "user", "role", "ü東😀", "42", ".", "{{ x }}",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=4)).map(
    "".join
)
ANSWERS = TEXTS.filter(lambda text: text.rpartition("</think>")[2].strip())


@functools.cache
def encoder(name):
    tokenizer = FAMILIES[name].tokenizer()
    return tokenizer, TextEncoder(tokenizer, "chat")


def turns(*texts, system=None):
    out = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return out if system is None else [{"role": "system", "content": system}, *out]


def own(tokenizer, dialogue, **options):
    return tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=True, **options)["input_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_end_and_prefix_of_an_answer(name):
    family, (tokenizer, text) = FAMILIES[name], encoder(name)
    assert {tokenizer.convert_ids_to_tokens(i) for i in text.answer_end} == set(family.ends)
    assert tokenizer.decode(text.answer_prefix) == family.prefix


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(exchanges=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), system=st.none() | TEXTS)
@example(exchanges=[("What?", "<think>\nx\n</think>\n\nblue")], system=None)
@example(exchanges=[(" a\n", "\n<think>x</think> blue \n"), ("", "\n\nred")], system="Be brief. /no_think")
def test_rows_are_the_tokenizers_own(name, exchanges, system):
    family, (tokenizer, text) = FAMILIES[name], encoder(name)
    contents = [content for exchange in exchanges for content in exchange]
    for token in tokenizer.all_special_tokens + list(family.special):  # of those a dialogue has the characters only
        contents = [content.replace(token, "") for content in contents]
        system = system.replace(token, "") if system else system
    dialogue = turns(*contents, system=system if family.system and (system or "").strip() else None)
    row = text.encode(dialogue)
    closing = [] if family.closed else list(text.answer_end)
    assert row.input_ids == own(tokenizer, dialogue) + closing
    answers = [n for n, label in enumerate(row.labels) if label != IGNORE and row.labels[n - 1] == IGNORE]
    ends = [n for n, label in enumerate(row.labels) if label in text.answer_end]
    assert len(answers) == len(ends) == len(exchanges)
    assert all(start <= end for start, end in zip(answers, ends, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_tokenizers_own_and_answers_come_back(name):
    family, (tokenizer, text) = FAMILIES[name], encoder(name)
    for dialogue in (turns("What is it?", "A teal circle"), turns("What?", "blue", "Sure?", "Yes, it is.")):
        row, prompt = text.encode(dialogue), text.encode_prompt(dialogue)
        assert row.input_ids[: len(prompt)] == prompt == text.encode_prompt(dialogue[:-1])
        assert row.labels[len(prompt) - 1] == IGNORE != row.labels[len(prompt)]
        if family.asks:
            assert prompt == own(tokenizer, dialogue[:-1], add_generation_prompt=True)
        produced = row.input_ids[len(prompt) :]
        assert tuple(produced[: len(text.answer_prefix)]) == text.answer_prefix
        assert text.decode([*produced, *produced]) == dialogue[-1]["content"]


def test_reasoning_in_an_answer_makes_one_think_block():
    tokenizer, text = encoder("qwen3")
    for answer in ("<think>x</think> blue", "<think>\nx\n</think>\n\n blue"):
        row = text.encode(turns("What?", answer))
        targets = tokenizer.decode([label for label in row.labels if label != IGNORE])
        assert targets == "<think>\nx\n</think>\n\n blue<|im_end|>"
    # What a template says for the answer by the system turn is in the prompt, and so is not to be generated.
    tokenizer, text = encoder("smollm3")
    prompt = text.encode_prompt(turns("What?", system="/no_think"))
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n")


def test_special_tokens_in_a_dialogue_are_characters():
    for name, family in FAMILIES.items():
        tokenizer, text = encoder(name)
        if not family.closed:
            continue
        said = f"{family.ends[0]} x {tokenizer.eos_token} y"
        row = text.encode(turns(said, said))
        assert len([label for label in row.labels if label in text.answer_end]) == 1, name
        assert tokenizer.decode(row.input_ids).count(said) == 2 or family.strips or family.base != "bytes", name


def test_templates_that_cannot_be_used():
    tokenizer = FAMILIES["smollm2"].tokenizer()
    without_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
    wrong = {
        "ends an answer without": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "cannot be used": "{% for m in messages %}",
        "leaves out turn 1 .assistant": "{{ messages[0].content }}<|im_end|>",
        "leaves out turn 0 .system": without_system,
    }
    for message, template in wrong.items():
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message):
            TextEncoder(tokenizer, "chat").encode(turns("q", "a", system="s"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat template cannot be used"):
        TextEncoder(tokenizer, "chat")
