"""Dialogues to tokens: text templates, and labels masked by exact character spans.

A template renders a dialogue into *pieces* of text, each marked as target or not, and as the template's own text or the
dialogue's. The special tokens of a template become ids; text of the dialogue never does, whatever it looks like (a user
who writes `<|im_end|>` has written ten characters). The text between special tokens is tokenised as one run, as the
tokenizer's authors do, and a token is a target when it covers a target character.

    plain      the answer alone: captions
    qa         "Question: {q}\\nAnswer: {a}"
    bare       "{q} {a}": the fewest tokens, for an LLM that is finetuned anyway
    vicuna_v1  Vicuna v1 as LLaVA-1.5 uses it
    llama2, llama3   of the Llama chat models
    chat       the tokenizer's own chat template (ChatML of Qwen, SmolLM, ...)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import jinja2
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from data_prep.store.errors import DataError
from data_prep.store.sample import Dialogue
from model.batch import IGNORE

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of Vicuna v1.1 and later."""


class TooLongError(DataError):
    """A dialogue has more tokens than `max_length`."""


class NoTargetError(DataError):
    """A dialogue has no token to learn."""


@dataclass(frozen=True)
class Piece:
    """A stretch of rendered text.

    Attributes:
        text: The characters.
        target: Whether the model learns to produce it.
        special: Whether special tokens are recognised in it: so in the template's text, not in the dialogue's.
    """

    text: str
    target: bool = False
    special: bool = False


@dataclass(frozen=True)
class Encoded:
    """One text row: token ids, and labels (the id itself, or `IGNORE`) of the same length, not shifted."""

    input_ids: list[int]
    labels: list[int]


def _own(text: str, target: bool = False) -> Piece:
    return Piece(text, target, special=True)


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


def _plain(dialogue: Dialogue, eos: str) -> list[Piece]:
    """The caption and the end token. What the user said is left out, as LLaVA does in pre-training."""
    _, pairs = _turns(dialogue)
    if len(pairs) != 1:
        raise DataError(f"template plain is for captions; this dialogue has {len(pairs)} user turns")
    answer = pairs[0][1]
    return [] if answer is None else [Piece(answer, True), _own(eos, True)]


def _qa(dialogue: Dialogue, eos: str) -> list[Piece]:
    system, pairs = _turns(dialogue)
    pieces = [Piece(system), _own("\n")] if system else []
    for question, answer in pairs:
        if question:
            pieces += [_own("Question: "), Piece(question), _own("\nAnswer:")]
        if answer is not None:
            # The space belongs to the answer: most words are one token with it and two without.
            pieces += [_own(" ", True), Piece(answer, True), _own(eos, True)]
    return pieces


def _bare(dialogue: Dialogue, eos: str) -> list[Piece]:
    system, pairs = _turns(dialogue)
    pieces = [Piece(system), _own("\n")] if system else []
    for number, (question, answer) in enumerate(pairs):
        if question:
            pieces += [_own("\n")] * (number > 0) + [Piece(question)]
        if answer is not None:
            pieces += [_own(" ", True), Piece(answer, True), _own(eos, True)]
    return pieces


def _vicuna_v1(dialogue: Dialogue, eos: str) -> list[Piece]:
    system, pairs = _turns(dialogue)
    pieces = [_own(VICUNA_SYSTEM) if system is None else Piece(system), _own(" ")]
    for question, answer in pairs:
        pieces += [_own("USER: "), Piece(question), _own(" ASSISTANT:")] if question else [_own("USER: ASSISTANT:")]
        if answer is not None:
            pieces += [_own(" ", True), Piece(answer, True), _own(eos, True)]
    return pieces


def _llama2(dialogue: Dialogue, eos: str) -> list[Piece]:
    system, pairs = _turns(dialogue)
    pieces: list[Piece] = []
    for number, (question, answer) in enumerate(pairs):
        pieces.append(_own("<s>[INST] "))
        if number == 0 and system:
            pieces += [_own("<<SYS>>\n"), Piece(system), _own("\n<</SYS>>\n\n")]
        pieces += [Piece(question), _own(" [/INST]")]
        if answer is not None:
            pieces += [_own(" ", True), Piece(answer, True), _own(" </s>", True)]
    return pieces


def _llama3(dialogue: Dialogue, eos: str) -> list[Piece]:
    pieces = [_own("<|begin_of_text|>")]
    for turn in dialogue:
        target = turn["role"] == "assistant"
        pieces += [
            _own(f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"),
            Piece(turn["content"], target),
            _own("<|eot_id|>", target),
        ]
    if dialogue[-1]["role"] != "assistant":
        pieces.append(_own("<|start_header_id|>assistant<|end_header_id|>\n\n"))
    return pieces


TEMPLATES: dict[str, Callable[[Dialogue, str], list[Piece]]] = {
    "plain": _plain,
    "qa": _qa,
    "bare": _bare,
    "vicuna_v1": _vicuna_v1,
    "llama2": _llama2,
    "llama3": _llama3,
}
_NEEDED = {"llama2": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")}
NAMES = (*TEMPLATES, "chat")


class TextEncoder:
    """Encodes dialogues for one tokenizer and one template.

    Args:
        tokenizer: A Hugging Face tokenizer with a `tokenizers` backend (offsets are needed); it is not changed.
        template: One of `NAMES`.
        max_length: Longest accepted row in tokens; none: any.

    Attributes:
        pad_id: Id to pad with; it may equal the end token, so masks go by length and never by id.

    Raises:
        DataError: unknown template, a tokenizer without offsets, end token or chat template, or without the special
            tokens of the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int | None = None) -> None:
        if template not in NAMES:
            raise DataError(f"template={template}: no such text template; there are {', '.join(NAMES)}")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; use its fast version")
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has no end token (eos_token), so no answer could end")
        self.template, self.max_length = template, max_length
        self._tokenizer = tokenizer
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        for token in _NEEDED.get(template, ()):
            if token not in self._special:
                raise DataError(f"template {template} needs the special token {token}, which the tokenizer lacks")
        self._split_special = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len)[::-1])) + ")")
        self._first, self._later = _plain_tokenizers(tokenizer)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = tokenizer("a").input_ids
        self._adds_start = ids[:1] == [tokenizer.bos_token_id]
        if template == "chat":
            self._trims, self._lead = self._chat_trims(), self._chat_lead()

    def encode(self, dialogue: Dialogue) -> Encoded:
        """One training row.

        Raises:
            TooLongError: more than `max_length` tokens.
            NoTargetError: nothing in it is a target.
            DataError: turns the template cannot render.
        """
        ids, targets = self._tokens(self.render(dialogue))
        if not any(targets):
            raise NoTargetError("nothing in the dialogue is an answer to learn")
        ids, targets = self._with_start(ids, targets)
        if self.max_length is not None and len(ids) > self.max_length:
            raise TooLongError(f"{len(ids)} tokens, max_length={self.max_length}")
        return Encoded(ids, [i if target else IGNORE for i, target in zip(ids, targets, strict=True)])

    def encode_prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids before the last answer (which may be missing): what the training row of the dialogue begins with.

        Raises:
            TooLongError: more than `max_length` tokens.
            DataError: turns the template cannot render.
        """
        asked = dialogue[:-1] if dialogue[-1]["role"] == "assistant" else dialogue
        # Cut out of a whole row: the tokens before an answer can depend on there being one ("\n\n" is one token, but
        # two before a word).
        ids, targets = self._with_start(*self._tokens(self.render([*asked, {"role": "assistant", "content": "A"}])))
        last = len(ids)
        while last and not targets[last - 1]:  # e.g. a line end after the end token
            last -= 1
        while last and targets[last - 1]:
            last -= 1
        ids = ids[:last]
        if self.max_length is not None and len(ids) > self.max_length:
            raise TooLongError(f"a prompt of {len(ids)} tokens, max_length={self.max_length}")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids up to the first end token, without special tokens and outer spaces."""
        ends = {self._tokenizer.eos_token_id, self._special.get("<|eot_id|>")}
        cut = next((n for n, i in enumerate(ids) if i in ends), len(ids))
        return self._tokenizer.decode(ids[:cut], skip_special_tokens=True).strip()

    def render(self, dialogue: Dialogue) -> list[Piece]:
        """The dialogue as pieces of text.

        Raises:
            DataError: turns the template cannot render.
        """
        if self.template == "chat":
            return self._chat(dialogue)
        return TEMPLATES[self.template](dialogue, self._tokenizer.eos_token)

    def _with_start(self, ids: list[int], targets: list[bool]) -> tuple[list[int], list[bool]]:
        """With a start token where the tokenizer adds one, or where the first token is a target."""
        if targets[0] or self._adds_start and ids[0] != self._start:
            return [self._start, *ids], [False, *targets]
        return ids, targets

    def _tokens(self, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
        """Ids, and whether each is a target."""
        ids: list[int] = []
        targets: list[bool] = []
        run: list[tuple[str, bool]] = []
        begun = False  # whether anything stands before, text or special token

        def end_run() -> None:
            nonlocal begun
            text = "".join(part for part, _ in run)
            if text:
                mask = [target for part, target in run for _ in part]
                encoding = (self._later if begun else self._first).encode(text, add_special_tokens=False)
                ids.extend(encoding.ids)
                # An empty span is the prefix that SentencePiece puts before a run: it goes with what follows.
                targets.extend(any(mask[start : max(end, start + 1)]) for start, end in encoding.offsets)
                begun = True
            run.clear()

        for piece in pieces:
            for number, part in enumerate(self._split_special.split(piece.text) if piece.special else [piece.text]):
                if number % 2:
                    end_run()
                    ids.append(self._special[part])
                    targets.append(piece.target)
                    begun = True
                elif part:
                    run.append((part, piece.target))
        end_run()
        return ids, targets

    def _render_chat(self, dialogue: Dialogue, asking: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=asking)
        except (jinja2.TemplateError, ValueError) as error:
            raise DataError(f"the tokenizer's chat template cannot render the dialogue: {error}") from error

    def _chat_trims(self) -> bool:
        """Whether the chat template strips the contents of turns."""
        probe = [{"role": "user", "content": " q "}, {"role": "assistant", "content": " a "}]
        return " a " not in self._render_chat(probe)

    def _chat_lead(self) -> str:
        """What the template puts between the end of a prompt and the answer: the model has to produce it as well."""
        probe = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\ue000"}]
        prompt, whole = self._render_chat(probe[:1], asking=True), self._render_chat(probe)
        lead = whole.removeprefix(prompt).partition("\ue000")[0] if whole.startswith(prompt) else ""
        return "" if self._split_special.search(lead) else lead

    def _chat(self, dialogue: Dialogue) -> list[Piece]:
        # Contents are rendered as private-use marks: what is the template's and what the dialogue's stays known.
        marked = [{**turn, "content": f"\ue000{n}\ue001"} for n, turn in enumerate(dialogue)]
        pieces: list[Piece] = []
        ending = False  # inside the end of an answer: up to its end token, the template's text is a target
        for number, part in enumerate(re.split("\ue000(\\d+)\ue001", self._render_chat(marked))):
            if number % 2:
                turn = dialogue[int(part)]
                content = turn["content"].strip() if self._trims else turn["content"]
                ending = turn["role"] == "assistant"
                if ending and self._lead and pieces and pieces[-1].text.endswith(self._lead):
                    pieces[-1:] = [_own(pieces[-1].text.removesuffix(self._lead)), _own(self._lead, True)]
                pieces.append(Piece(content, ending))
            elif ending:
                end = self._split_special.search(part)
                if end is None:
                    raise DataError("the tokenizer's chat template ends an answer without a special token")
                pieces += [_own(part[: end.end()], True), _own(part[end.end() :])]
            elif part:
                pieces.append(_own(part))
        return pieces


def _plain_tokenizers(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, Tokenizer]:
    """The backend for a run of text at the very beginning and for later ones, blind to special tokens.

    The two differ for SentencePiece models that put their word mark only before a text, not after a special token.
    """
    text = tokenizer.backend_tokenizer.to_str()
    first = later = Tokenizer.from_str(text)
    if '"prepend_scheme":"first"' in text:
        later = Tokenizer.from_str(text.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
    for each in (first, later):
        each.post_processor = processors.Sequence([])  # it may trim spaces off the offsets
        each.no_truncation()
        each.no_padding()
        each.encode_special_tokens = True
    return first, later
