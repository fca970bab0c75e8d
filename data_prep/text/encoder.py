"""Dialogues to tokens, with labels masked by exact character spans, and generated tokens back to answers.

A template (`data_prep.text.templates`) renders a dialogue into spans. The special tokens of its own text become ids;
text of the dialogue never does, whatever it looks like (a user who writes `<|im_end|>` has written ten characters). The
text between special tokens is tokenised as one run, as the tokenizer's authors do, and a token is a target when it
covers a target character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from data_prep.store.errors import DataError
from data_prep.store.sample import Dialogue
from data_prep.text.chat import ChatTemplate
from data_prep.text.dialogues import IMAGE_TOKEN, placed_images
from data_prep.text.templates import NAMES, NEEDED, TEMPLATES, Span
from model.batch import IGNORE

_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
"""What a special token with `lstrip` or `rstrip` swallows: Unicode's white space, without four of Python's."""

_OWN, _CONTENT = 1, 2
"""Targets: the template's own text, and that of the dialogue."""


class TooLongError(DataError):
    """A dialogue has more tokens than `max_length`."""


class NoTargetError(DataError):
    """A dialogue has no token to learn."""


@dataclass(frozen=True)
class Encoded:
    """One text row.

    Attributes:
        input_ids: Token ids.
        labels: The id itself, or `IGNORE`; of the same length, not shifted.
        image_at: In front of which token each image of the sample stands, its index in `input_ids`.
        slots: Where dead tokens stand (`official`).
    """

    input_ids: list[int]
    labels: list[int]
    image_at: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()


SLOT = 0
"""Id of the dead token that the released VLoRA keeps at an image: attended by nothing, but it has a position."""
_MARKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""One that a dialogue has not stands for an image while it is rendered: code points that Unicode keeps out of texts."""


class TextEncoder:
    """Encodes dialogues for one tokenizer and one template.

    Args:
        tokenizer: A Hugging Face tokenizer with a `tokenizers` backend (offsets are needed); it is not changed.
        template: One of `NAMES`.
        max_length: Longest accepted row in tokens; none: any.
        official: Text as the released VLoRA has it (docs/paper.md): a dead token at each image, a line end behind it,
            captions that end with a line end, a word mark after the end token.

    Attributes:
        answer_end: Ids of the tokens that end an answer in a row, each on its own: where generation stops.
        answer_prefix: Ids that the template puts before an answer and that the model has to produce (the empty think
            block of Qwen3); mostly none.
        pad_id: Id to pad with; it may equal the end token, so masks go by length and never by id.
        unknown_id: Id of what the tokenizer cannot spell; None where it can spell everything.

    Raises:
        DataError: unknown template, a tokenizer without offsets, end token or chat template, or without the special
            tokens of the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int | None = None,
        official: bool = False,
    ) -> None:
        if official and template not in ("plain", "vicuna_v1"):
            raise DataError(f"data.compat=official is for the templates plain and vicuna_v1, not {template}")
        if template not in NAMES:
            raise DataError(f"template={template}: no such text template; there are {', '.join(NAMES)}")
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"tokenizer {type(tokenizer).__name__} gives no character offsets; use its fast version")
        if tokenizer.eos_token is None and template != "chat":
            raise DataError("the tokenizer has no end token (eos_token), so no answer could end")
        self.template, self.max_length, self.official = template, max_length, official
        self._tokenizer = tokenizer
        self._special = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        for token in NEEDED.get(template, ()):
            if token not in self._special:
                raise DataError(f"template {template} needs the special token {token}, which the tokenizer lacks")
        self._split_special = re.compile("(" + "|".join(map(re.escape, sorted(self._special, key=len)[::-1])) + ")")
        self._first, self._later = _plain_tokenizers(tokenizer)
        if official:
            self._later = self._first
        self._start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        # A chat template says itself where a start token stands: `apply_chat_template` adds none.
        self._adds_start = template != "chat" and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self._chat = ChatTemplate(tokenizer, self._split_special) if template == "chat" else None
        self.answer_end, self.answer_prefix = self._answer_format()
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, self.answer_end[0])
        self.pad_id: int = next(i for i in padding if i is not None)
        # Byte-level tokenizers have no such token, or name their end token as one.
        self.unknown_id = None if tokenizer.unk_token_id in self.answer_end else tokenizer.unk_token_id
        words = tokenizer.decode(list(self.answer_prefix), skip_special_tokens=True).split()
        self._prefix = re.compile(r"\s*" + r"\s*".join(map(re.escape, words)))

    def encode(self, dialogue: Dialogue, images: int = 0) -> Encoded:
        """One training row.

        Args:
            dialogue: Its turns.
            images: Images that it talks about; each gets a place in the row.

        Raises:
            TooLongError: more than `max_length` tokens.
            NoTargetError: nothing in it is a target.
            DataError: turns the template cannot render.
        """
        ids, targets, places = self._row(dialogue, images)
        if not any(targets):
            raise NoTargetError("nothing in the dialogue is an answer to learn")
        if self.max_length is not None and len(ids) > self.max_length:
            raise TooLongError(f"{len(ids)} tokens, max_length={self.max_length}")
        return Encoded(
            ids, [i if target else IGNORE for i, target in zip(ids, targets, strict=True)], places, self._slots(places)
        )

    def encode_prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids of `prompt`."""
        return self.prompt(dialogue).input_ids

    def prompt(self, dialogue: Dialogue, images: int = 0) -> Encoded:
        """What stands before the last answer (which may be missing): the beginning of the dialogue's training row.

        Args:
            dialogue: Its turns.
            images: As in `encode`.

        Raises:
            TooLongError: more than `max_length` tokens.
            DataError: turns the template cannot render.
        """
        asked = dialogue[:-1] if dialogue[-1]["role"] == "assistant" else dialogue
        # Cut out of a whole row: the tokens before an answer can depend on there being one ("\n\n" is one token, but
        # two before a word).
        ids, targets, places = self._row([*asked, {"role": "assistant", "content": "A"}], images)
        ids = ids[: _answers(targets)[-1].start]
        if self.max_length is not None and len(ids) > self.max_length:
            raise TooLongError(f"a prompt of {len(ids)} tokens, max_length={self.max_length}")
        return Encoded(ids, [IGNORE] * len(ids), places, self._slots(places))

    def decode(self, ids: list[int]) -> str:
        """The answer in generated ids: up to its end, without what the template puts before it and outer spaces."""
        cut = next((n for n, i in enumerate(ids) if i in self.answer_end), len(ids))
        return self._prefix.sub("", self._tokenizer.decode(ids[:cut], skip_special_tokens=True), count=1).strip()

    def unknown_words(self, dialogue: Dialogue) -> list[str]:
        """Words of the answers that the tokenizer cannot spell."""
        words = [word for turn in dialogue if turn["role"] == "assistant" for word in turn["content"].split()]
        return [word for word in words if self.unknown_id in self._later.encode(word, add_special_tokens=False).ids]

    def render(self, dialogue: Dialogue) -> list[Span]:
        """The dialogue as spans of text.

        Raises:
            DataError: turns the template cannot render.
        """
        if self._chat is not None:
            return self._chat(dialogue)
        caption = self.official and self.template == "plain"
        return TEMPLATES[self.template](dialogue, "\n" if caption else self._tokenizer.eos_token)

    def _slots(self, places: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place - 1 for place in places) if self.official else ()

    def _answer_format(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`answer_end` and `answer_prefix`, read off a row."""
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}
        ids, targets, _ = self._row([question, answer] * (1 if self.template == "plain" else 2))
        answers = _answers(targets)
        ends = dict.fromkeys(ids[answer.stop - 1] for answer in answers)
        begin = answers[-1].start
        prefix = ids[begin : targets.index(_CONTENT, begin)]
        # Spaces alone are only how this answer's first word was cut.
        return tuple(ends), tuple(prefix) if self._tokenizer.decode(prefix).strip(" ") else ()

    def _row(self, dialogue: Dialogue, images: int = 0) -> tuple[list[int], list[int], tuple[int, ...]]:
        """Ids of a whole row, what of it is a target (`_OWN`, `_CONTENT` or 0), and the places of the images.

        It has a start token where the tokenizer adds one, or where the first token is a target.
        """
        mark = _unused_mark(dialogue) if images else None
        shown = _with_places(dialogue, images, mark, "\n" if self.official else "") if mark else dialogue
        ids, targets, places = self._tokens(self.render(shown), mark)
        if not places:  # nothing was asked: in front of the caption, after the start token
            places = [int(ids[:1] == [self._start])] * images
            if self.official and images:
                at = places[0]
                ids[at:at], targets[at:at] = [SLOT] * images, [0] * images
                places = [at + 1 + number for number in range(images)]
        if targets[:1] not in ([], [0]) or self._adds_start and ids[:1] != [self._start]:
            if self._start is None:
                raise DataError("an answer stands first in its row, and the tokenizer has no start token (bos_token)")
            return [self._start, *ids], [0, *targets], tuple(place + 1 for place in places)
        return ids, targets, tuple(places)

    def _tokens(self, spans: list[Span], image: str | None) -> tuple[list[int], list[int], list[int]]:
        """Ids, what each is as a target, and in front of which of them images stand (in the text: `image`)."""
        ids: list[int] = []
        targets: list[int] = []
        places: list[int] = []
        run: list[tuple[str, int]] = []
        marks: list[int] = []  # characters of the run in front of each image
        begun = False  # whether anything stands before, text or special token
        swallow = False  # the special token before the run takes the white space after it

        def end_run(swallowed: bool = False) -> None:
            nonlocal begun, swallow
            text = "".join(part for part, _ in run)
            start = len(text) - len(text.lstrip(_WHITE)) if swallow else 0
            text = text[start:].rstrip(_WHITE) if swallowed else text[start:]
            before = len(ids)
            places.extend([before] * len(marks))
            if text:
                mask = [target for part, target in run for _ in part][start:]
                encoding = (self._later if begun else self._first).encode(text, add_special_tokens=False)
                ids.extend(encoding.ids)
                # An empty stretch is the prefix that SentencePiece puts before a run: it goes with what follows.
                targets.extend(max(mask[start : max(end, start + 1)]) for start, end in encoding.offsets)
                begun = True
                # A word keeps the space before it: the image stands in front of the token that reaches behind the mark.
                for number, mark in enumerate(marks, len(places) - len(marks)):
                    ends = (n for n, (_, end) in enumerate(encoding.offsets) if end > mark - start)
                    places[number] = before + next(ends, len(encoding.ids))
            run.clear()
            marks.clear()
            swallow = False

        for span in spans:
            own = _OWN if span.target else 0
            for number, part in enumerate(self._split_special.split(span.text) if span.special else [span.text]):
                if number % 2:
                    token_id, token = self._special[part]
                    end_run(token.lstrip)
                    ids.append(token_id)
                    targets.append(own)
                    begun, swallow = True, token.rstrip
                elif part:
                    for stretch in re.split(f"({image})", part) if image else [part]:
                        if stretch == image and self.official:
                            end_run()
                            ids.append(SLOT)
                            targets.append(0)
                            places.append(len(ids))
                        elif stretch == image:
                            marks.append(sum(len(text) for text, _ in run))
                        elif stretch:
                            run.append((stretch, own if span.special or not own else _CONTENT))
        end_run()
        return ids, targets, places


def _unused_mark(dialogue: Dialogue) -> str:
    text = "".join(turn["content"] for turn in dialogue)
    mark = next((mark for mark in _MARKS if mark not in text), None)
    if mark is None:
        raise DataError("the dialogue holds every character that could mark the place of an image (U+FDD0 to U+FDEF)")
    return mark


def _with_places(dialogue: Dialogue, images: int, mark: str, then: str = "") -> Dialogue:
    """The dialogue with a mark for every image: where its source has one, else (with `then`) before the question."""
    said = [turn["content"] if turn["role"] == "user" else "" for turn in dialogue]
    if placed_images(dialogue) == images:
        texts = [text.replace(IMAGE_TOKEN, mark).strip() for text in said]
        return [{**turn, "content": text or turn["content"]} for turn, text in zip(dialogue, texts, strict=True)]
    first = next((n for n, turn in enumerate(dialogue) if turn["role"] == "user"), 0)
    if not said[first].strip():
        return dialogue
    question = said[first].lstrip()
    content = said[first][: len(said[first]) - len(question)] + mark * images + then + question
    return [{**turn, "content": content} if n == first else turn for n, turn in enumerate(dialogue)]


def _answers(targets: list[int]) -> list[range]:
    """The stretches of a row that are targets."""
    edges = [n for n in range(len(targets) + 1) if bool(sum(targets[n : n + 1])) != bool(n and targets[n - 1])]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


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
