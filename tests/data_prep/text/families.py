"""Chat templates in the shapes of the model families' own, with small tokenizers that have the same special tokens."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a user and an assistant. USER: What is it? ASSISTANT: A teal circle. You are helpful, be brief.",
    "what color is the shape? is there a red blue green black shape? yes no <think> </think> [INST] [/INST]",
] * 4


@functools.cache
def byte_level() -> str:
    """A byte-level BPE of 500 tokens, serialised."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return trained.to_str()


@functools.cache
def sentencepiece(prefix: str) -> str:
    """A Llama-style BPE with byte fallback, serialised.

    Args:
        prefix: Where the word mark is put: `always` (before every run, as old Llama), `first` or `never` (Gemma).
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # SentencePiece merges nothing across words
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *state["vocab"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([] if prefix == "never" else [decoders.Strip(" ", 1, 0)])])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


@dataclass(frozen=True)
class Family:
    """A chat template and what its tokenizer is like.

    Attributes:
        template: Jinja.
        special: Its special tokens.
        ends: Those that end an answer, the last answer's first.
        eos: The tokenizer's `eos_token`, often another one.
        base: The kind of tokenizer: `bytes`, or `sentencepiece`'s prefix.
        words: Added tokens that are not special.
        strips: White space that special tokens take: `r`, `lr` or nothing.
        bos: The tokenizer's `bos_token`.
        prefix: What the template has the model write before an answer.
        system: Whether a system turn is accepted.
        asks: Whether rows begin with what `add_generation_prompt=True` gives.
        closed: Whether the last answer ends with a token.
    """

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    eos: str | None
    base: str = "bytes"
    words: tuple[str, ...] = ()
    strips: str = ""
    bos: str | None = None
    prefix: str = ""
    system: bool = True
    asks: bool = True
    closed: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A new tokenizer of the family."""
        return copy.deepcopy(_tokenizer(self))


@functools.cache
def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(byte_level() if family.base == "bytes" else sentencepiece(family.base))
    flags = {"lstrip": "l" in family.strips, "rstrip": "r" in family.strips, "normalized": False}
    ends = [family.bos, family.eos, *(["<unk>"] if family.base != "bytes" else [])]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ends if token])
    backend.add_special_tokens([AddedToken(token, **flags) for token in family.special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.words])
    unknown = {} if family.base == "bytes" else {"unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, chat_template=family.template, **unknown
    )
    assert tokenizer.chat_template == family.template
    return tokenizer


def _chatml(
    before: str = "", content: str = "message.content", asked: str = "<|im_start|>assistant\\n", end: str = "\\n"
) -> str:
    return (
        before + "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + " + content + " + '<|im_end|>" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + asked + "' }}{% endif %}"
    )


_IM = ("<|im_start|>", "<|im_end|>")
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"

_GEMMA = (
    "{{ bos_token }}" + _NO_SYSTEM + "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_QWEN2 = _chatml(
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
)
_QWEN3 = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>')
            and message.content.endswith('</tool_response>')) %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}{%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_SMOLLM3 = """\
{%- set mode = '/think' %}{%- set first = 0 %}
{%- if messages[0].role == 'system' %}
    {%- set first = 1 %}{%- set said = messages[0].content %}
    {%- if '/no_think' in said %}{%- set mode = '/no_think' %}{%- endif %}
    {%- set said = said.replace('/no_think', '').replace('/think', '').rstrip() %}
    {{- '<|im_start|>system\\nMode: ' + mode + '\\n' + said + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages[first:] %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- generation %}
        {%- set empty = '' if mode == '/think' else '<think>\\n\\n</think>\\n' %}
        {{- '<|im_start|>assistant\\n' + empty + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if mode == '/think' else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""
_LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{{ bos_token if loop.first }}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set talk = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set talk = messages %}{% endif %}{% for m in talk %}"
    "{% if loop.first and system %}{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
    "{% else %}{% set text = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
)
_MISTRAL7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_DEEPSEEK_V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_GPT_OSS = (
    "{{ '<|start|>system<|message|>You are a model.\\nReasoning: medium<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}"
    "{% elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% set who = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + who[m.role] + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
_GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
_OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token"
    " + ('' if loop.last else '\\n') }}{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
_VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set talk = messages[1:] %}"
    "{% else %}{{ 'A chat. ' }}{% set talk = messages %}{% endif %}{% for m in talk %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content.strip() }}{% else %}{{ ' ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
_EXAONE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{{ '[|' + m.role + '|]' + m.content }}{{ '\\n' if m.role == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
_OPENCHAT = (
    "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content }}"
    "{{ '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
_FALCON3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}"
    "{{ '' if loop.last else '\\n' }}{% else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

FAMILIES = {
    "gemma": Family(
        _GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("<end_of_turn>",), "<eos>", "never", bos="<bos>", system=False
    ),
    "phi3": Family(
        _PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",), "<|endoftext|>", "always",
        strips="r", bos="<s>",
    ),
    "phi4": Family(_PHI4, (*_IM, "<|im_sep|>"), ("<|im_end|>",), "<|im_end|>", strips="lr"),
    "qwen2.5-base": Family(_QWEN2, _IM, ("<|im_end|>",), "<|endoftext|>", words=("<tool_call>", "</tool_call>")),
    "qwen3": Family(
        _QWEN3, _IM, ("<|im_end|>",), "<|im_end|>", words=("<think>", "</think>"), prefix="<think>\n\n</think>\n\n"
    ),
    "smollm3": Family(_SMOLLM3, _IM, ("<|im_end|>",), "<|im_end|>", words=("<think>", "</think>")),
    "smollm2": Family(_chatml(), _IM, ("<|im_end|>",), "<|im_end|>", bos="<|im_start|>"),
    "chatml-never-asks": Family(_chatml(asked=""), _IM, ("<|im_end|>",), "<|endoftext|>", asks=False),
    "llama3-base": Family(
        _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("<|eot_id|>",), "<|end_of_text|>",
        bos="<|begin_of_text|>",
    ),
    "llama2": Family(_LLAMA2, (), ("</s>",), "</s>", "first", bos="<s>"),
    "mistral": Family(_MISTRAL, (), ("</s>",), "</s>", "always", bos="<s>", system=False),
    "mistral-v7": Family(
        _MISTRAL7, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("</s>",), "</s>", bos="<s>"
    ),
    "yi": Family(_chatml(), _IM, ("<|im_end|>",), "<|endoftext|>", "always", bos="<|startoftext|>"),
    "internlm2": Family(_chatml("{{ bos_token }}"), _IM, ("<|im_end|>",), "</s>", "first", bos="<s>"),
    "zephyr": Family(_ZEPHYR, (), ("</s>",), "</s>", "always", bos="<s>"),
    "deepseek-r1": Family(
        _DEEPSEEK_R1, ("<｜User｜>", "<｜Assistant｜>"), ("<｜end▁of▁sentence｜>",), "<｜end▁of▁sentence｜>",
        words=("<think>", "</think>"), bos="<｜begin▁of▁sentence｜>", asks=False,
    ),
    "deepseek-v2": Family(
        _DEEPSEEK_V2, (), ("<｜end▁of▁sentence｜>",), "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>"
    ),
    "glm4": Family(
        _GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"), ("<|user|>",), "<|endoftext|>",
        closed=False, prefix="\n",
    ),
    "gpt-oss": Family(
        _GPT_OSS, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), ("<|return|>", "<|end|>"),
        "<|return|>", asks=False,
    ),
    "command-r": Family(
        _COMMAND_R,
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        ("<|END_OF_TURN_TOKEN|>",), "<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>",
    ),
    "granite": Family(
        _GRANITE, ("<|start_of_role|>", "<|end_of_role|>"), ("<|end_of_text|>",), "<|end_of_text|>"
    ),
    "olmo2": Family(_OLMO2, (), ("<|endoftext|>",), "<|endoftext|>", bos="<|endoftext|>"),
    "vicuna": Family(_VICUNA, (), ("</s>",), "</s>", "first", bos="<s>"),
    "exaone": Family(
        _EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), ("[|endofturn|]",), "[|endofturn|]",
        bos="[BOS]",
    ),
    "openchat": Family(_OPENCHAT, ("<|end_of_turn|>",), ("<|end_of_turn|>",), "</s>", "first", bos="<s>"),
    "falcon3": Family(_FALCON3, (), ("<|endoftext|>",), "<|endoftext|>"),
}  # fmt: skip
