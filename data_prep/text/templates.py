r"""Text templates: a dialogue as spans of text, each marked as target or not.

plain      the answer alone: captions
qa         "Question: {q}\nAnswer: {a}"
bare       "{q} {a}": the fewest tokens, for an LLM that is finetuned anyway
vicuna_v1  Vicuna v1 as LLaVA-1.5 uses it
llama2, llama3   of the Llama chat models
chat       the tokenizer's own chat template (ChatML of Qwen, SmolLM, ...): `data_prep.text.chat`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.store.errors import DataError
from data_prep.store.sample import Dialogue

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of Vicuna v1.1 and later."""


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text.

    Attributes:
        text: The characters.
        target: Whether the model learns to produce it.
        special: Whether special tokens are recognised in it: so in the template's text, not in the dialogue's.
    """

    text: str
    target: bool = False
    special: bool = False


def own(text: str, target: bool = False) -> Span:
    """A stretch of the template's own text."""
    return Span(text, target, special=True)


def _turns(dialogue: Dialogue) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The system text, and (user, assistant) pairs; the last answer is none in a prompt."""
    system = None
    pairs: list[tuple[str, str | None]] = []
    for number, turn in enumerate(dialogue):
        role, content = turn["role"], turn["content"]
        if role == "system" and number == 0:
            system = content
        elif role == "user" and (not pairs or pairs[-1][1] is not None):
            pairs.append((content, None))
        elif role == "assistant" and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], content)
        else:
            raise DataError(f"turn {number} is {role!r}: turns alternate user, assistant after at most one system turn")
    return system, pairs


def _plain(dialogue: Dialogue, eos: str) -> list[Span]:
    """The caption and the end token. What the user said is left out, as LLaVA does in pre-training."""
    _, pairs = _turns(dialogue)
    if len(pairs) != 1:
        raise DataError(f"template plain is for captions; this dialogue has {len(pairs)} user turns")
    answer = pairs[0][1]
    return [] if answer is None else [Span(answer, True), own(eos, True)]


def _qa(dialogue: Dialogue, eos: str) -> list[Span]:
    system, pairs = _turns(dialogue)
    spans = [Span(system), own("\n")] if system else []
    for question, answer in pairs:
        if question:
            spans += [own("Question: "), Span(question), own("\nAnswer:")]
        if answer is not None:
            # The space belongs to the answer: most words are one token with it and two without.
            spans += [own(" ", True), Span(answer, True), own(eos, True)]
    return spans


def _bare(dialogue: Dialogue, eos: str) -> list[Span]:
    system, pairs = _turns(dialogue)
    spans = [Span(system), own("\n")] if system else []
    for number, (question, answer) in enumerate(pairs):
        if question:
            spans += [own("\n")] * (number > 0) + [Span(question)]
        if answer is not None:
            spans += [own(" ", True), Span(answer, True), own(eos, True)]
    return spans


def _vicuna_v1(dialogue: Dialogue, eos: str) -> list[Span]:
    system, pairs = _turns(dialogue)
    spans = [own(VICUNA_SYSTEM) if system is None else Span(system), own(" ")]
    for question, answer in pairs:
        spans += [own("USER: "), Span(question), own(" ASSISTANT:")] if question else [own("USER: ASSISTANT:")]
        if answer is not None:
            spans += [own(" ", True), Span(answer, True), own(eos, True)]
    return spans


def _llama2(dialogue: Dialogue, eos: str) -> list[Span]:
    system, pairs = _turns(dialogue)
    spans: list[Span] = []
    for number, (question, answer) in enumerate(pairs):
        spans.append(own("<s>[INST] "))
        if number == 0 and system:
            spans += [own("<<SYS>>\n"), Span(system), own("\n<</SYS>>\n\n")]
        spans += [Span(question), own(" [/INST]")]
        if answer is not None:
            spans += [own(" ", True), Span(answer, True), own(" </s>", True)]
    return spans


def _llama3(dialogue: Dialogue, eos: str) -> list[Span]:
    spans = [own("<|begin_of_text|>")]
    for turn in dialogue:
        target = turn["role"] == "assistant"
        spans += [
            own(f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"),
            Span(turn["content"], target),
            own("<|eot_id|>", target),
        ]
    if dialogue[-1]["role"] != "assistant":
        spans.append(own("<|start_header_id|>assistant<|end_header_id|>\n\n"))
    return spans


TEMPLATES: dict[str, Callable[[Dialogue, str], list[Span]]] = {
    "plain": _plain,
    "qa": _qa,
    "bare": _bare,
    "vicuna_v1": _vicuna_v1,
    "llama2": _llama2,
    "llama3": _llama3,
}
NEEDED = {"llama2": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")}
"""Special tokens without which a template means nothing."""
NAMES = (*TEMPLATES, "chat")
