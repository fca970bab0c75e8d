"""The tokenizer's own chat template: which of its text the model has to produce, and where an answer ends."""

from __future__ import annotations

import functools
import os.path
import re

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from data_prep.store.errors import DataError
from data_prep.store.sample import Dialogue
from data_prep.text.templates import Span, own

_MARK = re.compile("\ue000(\\d+)\ue001")
_SEARCHES = (
    "split",
    "rsplit",
    "partition",
    "rpartition",
    "startswith",
    "endswith",
    "replace",
    "find",
    "rfind",
    "index",
)


class ChatTemplate:
    """Renders dialogues as `apply_chat_template` does, and knows which characters are whose.

    The contents of turns are rendered as private-use marks. What a template can find in a content stays as it is: white
    space at the ends, and every string that it looks for (`</think>`, `/no_think`), unless that holds a special token.
    So the template strips, splits and moves the contents as it would without the marks.

    Targets are what a model that is given the template's generation prompt has to produce: what stands between that
    prompt and the answer (the empty think block of Qwen3), the answer, and its end up to and with the first special
    token. Text before an answer that holds a special token is no target: it belongs to the prompt. A template that puts
    nothing after the last answer (GLM-4) gets there what ends the answers before.

    Args:
        tokenizer: With a chat template; it is not changed.
        special: Matches the tokenizer's special tokens.

    Raises:
        DataError: no chat template, or one that cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._added = _any_of({t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()})
        try:
            sought = _sought(str(tokenizer.get_chat_template()))
        except (ValueError, jinja2.TemplateError) as error:
            raise DataError(f"template=chat: the tokenizer's chat template cannot be used: {error}") from error
        self._sought = _any_of({text for text in sought if text.strip() and not special.search(text)})
        self._asked = functools.lru_cache(maxsize=64)(self._find_asked)
        texts, _ = self._render(_dialogue(None, "q", "a", "q", "a"))
        end = self._end(texts[4]) or self._end(texts[2])
        if end is None:
            raise DataError("template=chat: the tokenizer's chat template ends an answer without a special token")
        self._closing = end.group()

    def __call__(self, dialogue: Dialogue) -> list[Span]:
        """The dialogue as spans of text.

        Raises:
            DataError: turns that the template cannot render, or leaves out.
        """
        texts, marks = self._render(dialogue)
        asked = self._asked(dialogue[0]["content"] if dialogue[0]["role"] == "system" else None)
        spans: list[Span] = []
        before = None  # the turn of the content before this text, if that is an answer
        for text, (turn, content) in zip(texts, [*marks, (None, "")], strict=True):
            answer = turn if turn is not None and dialogue[turn]["role"] == "assistant" else None
            end = 0  # of what is a target as the end of the answer before
            if before is not None and before != answer:
                found = self._end(text)
                if found is None and turn is not None:
                    raise DataError("the tokenizer's chat template ends an answer without a special token")
                end = len(text) if found is None else found.end()
                spans.append(own(text[:end] if found is not None else text + self._closing, True))
            start = end if before == answer else self._start(text, end, asked)
            spans += [own(text[end:start]), own(text[start:], answer is not None), Span(content, answer is not None)]
            before = answer
        return [span for span in spans if span.text]

    def _render(self, dialogue: Dialogue, asking: bool = False) -> tuple[list[str], list[tuple[int, str]]]:
        """The template's texts, and between each two the number of a turn and a part of its content."""
        marks: list[tuple[int, str]] = []

        def mark(turn: int, text: str) -> str:
            marks.append((turn, text))
            return f"\ue000{len(marks) - 1}\ue001"

        def shown(turn: int, text: str) -> str:
            inner = text.strip()
            before, _, after = text.partition(inner) if inner else (text, "", "")
            return before + (mark(turn, inner) if inner else "") + after

        turns = []
        for number, turn in enumerate(dialogue):
            found = len(marks)
            parts = self._sought.split(turn["content"])
            content = "".join(part if n % 2 else shown(number, part) for n, part in enumerate(parts))
            if len(marks) == found and turn["role"] == "assistant":  # an answer has a place even if it is empty
                content += mark(number, "")
            turns.append({**turn, "content": content})
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asking)
        except (jinja2.TemplateError, ValueError) as error:
            raise DataError(f"the tokenizer's chat template cannot render the dialogue: {error}") from error
        parts = _MARK.split(str(text))
        shown_marks = [marks[int(number)] for number in parts[1::2]]
        lost = {turn for turn, _ in marks} - {turn for turn, _ in shown_marks}
        if lost:
            raise DataError(
                f"the tokenizer's chat template leaves out turn {min(lost)} ({dialogue[min(lost)]['role']})"
            )
        return parts[::2], shown_marks

    def _find_asked(self, system: str | None) -> str:
        """What stands between a question and the point where an answer begins to be generated."""
        prompt, _ = self._render(_dialogue(system, "q"), asking=True)
        whole, _ = self._render(_dialogue(system, "q", "a"))
        # A template may ask for more than a row holds (DeepSeek-R1: an opened think block).
        return os.path.commonprefix([prompt[-1], whole[-2]])

    def _start(self, text: str, begin: int, asked: str) -> int:
        """Where in the text between a question and its answer the model takes over."""
        at = text.find(asked, begin)
        if at < 0 or self._special.search(text, at + len(asked)):
            return len(text)
        return at + len(asked)

    def _end(self, text: str) -> re.Match[str] | None:
        return self._special.search(text) or self._added.search(text)


def _dialogue(system: str | None, *texts: str) -> Dialogue:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest first, as its only group."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if texts else "((?!))")


class _Generation(Extension):
    """`{% generation %}`, by which templates mark for transformers what the model produces; parsed here only."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _sought(template: str) -> set[str]:
    """Strings that a template looks for in what it renders."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    constants: dict[str, set[str]] = {}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and isinstance(assign.node, nodes.Const):
            constants.setdefault(assign.target.name, set()).add(assign.node.value)
    looked_for: list[nodes.Expr] = []
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHES:
            looked_for += call.args
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name == "replace":
            looked_for += filtered.args
    for comparison in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in comparison.ops):
            looked_for.append(comparison.expr)
    found: set[object] = {node.value for node in looked_for if isinstance(node, nodes.Const)}
    for node in looked_for:
        if isinstance(node, nodes.Name):
            found |= constants.get(node.name, set())
    return {value for value in found if isinstance(value, str)}
