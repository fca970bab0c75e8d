"""A run as a model of lmms-eval, in its own processes: one per GPU under torchrun. Runs in lmms-eval's environment.

Needs our packages `common`, `model`, `data_prep` and `vlora` there and no other package beside lmms-eval's own.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from common.errors import UserError
from train.harness.inside.controls import NoImage, Shuffled
from vlora.folder import load

_LONGEST = 1024
Chat = list[dict[str, Any]]


class _InProcess(lmms):
    """Loads a run and answers in batches; the questions are shared among the ranks by lmms-eval.

    An answer ends where the model ends it, as in training: a task's `until` is not looked at, and lmms-eval's client of
    servers does not send it either. All images of a conversation count for all of its text.

    Args:
        run: Run directory, exported folder or Hugging Face name.
        dtype: `float32`, `bfloat16`, or `auto`: what it was trained in.
        batch_size: Questions answered together by each rank; lmms-eval's `--batch_size`.
        device: lmms-eval's `--device`; none, or several ranks: a GPU for each rank where there are some.
        llm, vision: Where the run's base models are now, if they have moved.

    Raises:
        UserError: no such run, its base models are others, or ranks that are no process group.
    """

    def __init__(
        self,
        run: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        llm: str | None = None,
        vision: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if (started := int(os.environ.get("WORLD_SIZE", "1"))) != self._world_size:
            raise UserError(
                f"{started} ranks were started and do not find each other; on CPUs set ACCELERATE_USE_CPU=true"
            )
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        self.rows = int(batch_size)
        with self._ending_all_ranks():
            self.model, self.processor = load(str(run), dtype=dtype, device=self.device, llm=llm, vision=vision)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the questions."""
        asked = [self.question(request) for request in requests]
        answers = [""] * len(asked)
        with self._ending_all_ranks(), tqdm(total=len(asked), desc="answers", disable=self._rank > 0) as bar:
            for options, numbers in self._batches(asked):
                chats = [asked[number][0]() for number in numbers]
                for number, answer in zip(numbers, self._answers(chats, options), strict=True):
                    answers[number] = answer
                bar.update(len(numbers))
        return answers

    def question(self, request: Any) -> tuple[Callable[[], Chat], dict[str, Any], str]:
        """What makes a request's conversation, how it is to be answered, and its text."""
        raise NotImplementedError

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of answers that a task gives."""
        raise NotImplementedError("a task that ranks given answers wants --force_simple")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("tasks of several rounds are not supported")

    def _batches(self, asked: list[Any]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Questions answered in the same way, texts of like length together, the longest first."""
        keys = [json.dumps(options, sort_keys=True, default=str) for _, options, _ in asked]
        order = sorted(range(len(asked)), key=lambda number: (keys[number], -len(asked[number][2])))
        for _, same in itertools.groupby(order, key=keys.__getitem__):
            numbers = list(same)
            for start in range(0, len(numbers), self.rows):
                yield asked[numbers[start]][1], numbers[start : start + self.rows]

    def _answers(self, chats: list[Chat], options: dict[str, Any]) -> list[str]:
        inputs = self.processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
        inputs = inputs.to(self.device)
        longest = options.get("max_new_tokens") or _LONGEST
        chosen = {"max_new_tokens": longest + len(self.processor.text.answer_prefix), "do_sample": False}
        if options.get("num_beams"):
            chosen["num_beams"] = options["num_beams"]
        if options.get("temperature"):
            chosen |= {"do_sample": True, "temperature": options["temperature"], "top_p": options.get("top_p") or 1.0}
        out = self.model.generate(**inputs, **chosen)
        return [self.processor.answer(ids) for ids in out[:, inputs["input_ids"].shape[1] :]]

    @contextmanager
    def _ending_all_ranks(self) -> Iterator[None]:
        """lmms-eval logs what a rank raises, and the others wait for it for hours: end it, and torchrun ends them."""
        try:
            yield
        except Exception:
            if self._world_size == 1:
                raise
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


class VLoRA(_InProcess):
    """The model `vlora`: conversations, as lmms-eval's chat models take them."""

    is_simple = False

    def question(self, request: Any) -> tuple[Callable[[], Chat], dict[str, Any], str]:
        """As the task's `doc_to_messages` makes it."""
        context, to_messages, options, doc, task, split = request.args
        return lambda: to_messages(self.task_dict[task][split][doc]), options, str(context)


class VLoRAShuffled(Shuffled, VLoRA):
    """Every question with a wrong image."""


class VLoRANoImage(NoImage, VLoRA):
    """Every question without an image."""


class VLoRASimple(_InProcess):
    """The model `vlora` with `--force_simple`: one turn, the images and then the text; also ranks given answers."""

    is_simple = True

    def question(self, request: Any) -> tuple[Callable[[], Chat], dict[str, Any], str]:
        """The task's text and images."""
        context, options, to_images, doc, task, split = request.args
        return lambda: _turn(context, to_images(self.task_dict[task][split][doc])), options, str(context)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each given answer and its end, as training weighs them; and whether it is greedy."""
        found: list[tuple[float, bool]] = []
        with self._ending_all_ranks(), tqdm(total=len(requests), desc="answers", disable=self._rank > 0) as bar:
            for start in range(0, len(requests), self.rows):
                part = requests[start : start + self.rows]
                found += self._weigh([self._given(request) for request in part])
                bar.update(len(part))
        return found

    def _given(self, request: Any) -> tuple[str, list[Any], str]:
        """Question, images and answer of a request; `acc_mutual_info` asks for an answer alone."""
        context, answer, *place = request.args
        if not place:
            return context, [], answer
        to_images, doc, task, split = place
        document = self.task_dict[task][split][doc]
        return context, to_images(document) or [], answer(document) if callable(answer) else answer

    @torch.no_grad()
    def _weigh(self, given: list[tuple[str, list[Any], str]]) -> list[tuple[float, bool]]:
        talks = [
            ([{"role": "user", "content": text}, {"role": "assistant", "content": answer.strip()}], images)
            for text, images, answer in given
        ]
        rows = [self.processor.text.encode(talk, len(images)) for talk, images in talks]
        inputs = self.processor.batch(
            [row.input_ids for row in rows], [images for _, images in talks], [row.image_at for row in rows]
        ).to(self.device)
        answers = [[token for token in row.labels if token >= 0] for row in rows]
        kept = max(map(len, answers))
        # Rows are padded on the left, so answers stand at the end of all of them; what predicts one, a token before.
        chances = self.model(**inputs, logits_to_keep=kept + 1).logits[:, -kept - 1 : -1].float().log_softmax(-1)
        found = []
        for answer, chance in zip(answers, chances, strict=True):
            wanted, own = torch.tensor(answer, device=chance.device), chance[-len(answer) :]
            total = own.gather(1, wanted[:, None]).sum()
            found.append((float(total), bool((own.argmax(-1) == wanted).all())))
        return found


def _turn(text: str, images: list[Any] | None) -> Chat:
    content = [{"type": "image", "image": image} for image in images or []]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
