"""A model of lmms-eval with every question's image exchanged or taken away. Runs in lmms-eval's environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.chat.openai import OpenAICompatible

_TRIES = 1000


class _Controlled(lmms):
    """Asks the task's own questions; what they show is `shown`'s to say. Stands before the model in a class's bases."""

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """As the model does."""
        for request in requests:
            context, to_messages, options, doc, task, split = request.args
            documents = self.task_dict[task][split]
            request.arguments = (context, self.shown(to_messages, documents, doc), options, doc, task, split)
        return super().generate_until(requests)

    def shown(self, to_messages: Callable, documents: Any, number: int) -> Callable:
        """The function that makes the messages of question `number`."""
        raise NotImplementedError


class Shuffled(_Controlled):
    """Every question with the image of another one: of the first that differs, from half the data away on."""

    def shown(self, to_messages: Callable, documents: Any, number: int) -> Callable:
        """With other images, as many as its own."""

        def messages(document: Any) -> list[dict[str, Any]]:
            own = to_messages(document)
            if not (images := _images(own)):
                return own
            others = _others(to_messages, documents, number, images[0]["url"])
            for place, image in enumerate(images):
                image["url"] = others[place % len(others)]
            return own

        return messages


class NoImage(_Controlled):
    """Every question without an image: what the language model answers blind."""

    def shown(self, to_messages: Callable, documents: Any, number: int) -> Callable:
        """With its text alone."""

        def messages(document: Any) -> list[dict[str, Any]]:
            own = to_messages(document)
            for message in own:
                message["content"] = [part for part in message["content"] if part["type"] != "image"]
            return own

        return messages


class ServerShuffled(Shuffled, OpenAICompatible):
    """Asked of a server."""


class ServerNoImage(NoImage, OpenAICompatible):
    """Asked of a server."""


def _images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"] if part["type"] == "image"]


def _others(to_messages: Callable, documents: Any, number: int, image: Any) -> list[Any]:
    count = len(documents)
    for step in range(min(count, _TRIES)):
        found = [part["url"] for part in _images(to_messages(documents[(number + count // 2 + step) % count]))]
        if found and (found[0].size != image.size or found[0].tobytes() != image.tobytes()):
            return found
    raise ValueError(f"question {number}: no other image among the {_TRIES} questions looked at")
