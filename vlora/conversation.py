"""A conversation about images: they are encoded once, and every later answer costs what the plain LLM costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

from data_prep.store.sample import Dialogue
from model.decoder.cross_attention import VisualContext
from model.deploy.merging import MergeReport
from model.generator.weights import PerceptualWeights
from vlora.streaming import AnswerStreamer

if TYPE_CHECKING:
    from vlora.modeling import VLoRAForConditionalGeneration
    from vlora.processing import Picture, VLoRAProcessor


class _Stopped(Exception):
    """The reader of a stream has gone."""


class Conversation:
    """Turns about a set of images that may change between them.

    All images count for all of the text: after a change the next answer is the one that a new conversation with the
    same turns and the new images would give. While the images stay, the cache of keys and values is kept from turn to
    turn; images take no place in it.

    Args:
        model: A trained model.
        processor: Its processor.
        images: To begin with.
        merge: Fold the images' weights into the language model while they stay the same: it then decodes as a plain
            LLM, and rounding loses what `report` says. The model must not be used elsewhere at the same time.

    Attributes:
        dialogue: The turns so far.
        report: What the last merge lost by rounding; none without `merge`.
        last_tokens: Tokens of the last answer, its end included.
    """

    def __init__(
        self,
        model: VLoRAForConditionalGeneration,
        processor: VLoRAProcessor,
        images: Sequence[Picture] = (),
        merge: bool = False,
    ) -> None:
        self.model, self.processor, self.merge = model, processor, merge
        self.dialogue: Dialogue = []
        self.report: MergeReport | None = None
        self.last_tokens = 0
        self._told: MergeReport | None = None
        self._images: list[Picture] = []
        self._seen: PerceptualWeights | VisualContext | None = None
        self._pixels: torch.Tensor | None = None
        self._merged = ExitStack()
        self._cache: Any = None
        self._ids: torch.Tensor | None = None
        for image in images:
            self.add(image)

    @property
    def images(self) -> list[Picture]:
        """The images now."""
        return list(self._images)

    @property
    def weights(self) -> PerceptualWeights | None:
        """Their weights, summed; none without images, and for connectors that make no weights."""
        return self._seen if isinstance(self._seen, PerceptualWeights) else None

    def fresh_report(self) -> MergeReport | None:
        """`report`, once after every merge."""
        fresh = self.report if self.report is not self._told else None
        self._told = self.report
        return fresh

    def add(self, image: Picture) -> None:
        """Add an image; it is encoded here, once.

        Raises:
            DataError: it is no sound image.
        """
        pixels = self.processor.image_processor(image)["pixel_values"].to(self.model.device)
        self._images.append(image)
        seen: Any = self.model.look(pixels)[0]
        self._set(seen if self._seen is None else self._seen + seen)
        self._pixels = pixels if self._pixels is None else torch.cat([self._pixels, pixels])
        self._forget()

    def show(self, images: Sequence[Picture]) -> None:
        """Talk about these images in place of the ones before; none: about the text alone.

        Raises:
            DataError: one of them is no sound image; the ones before stay.
        """
        for image in images:
            self.processor.image_processor(image)
        self.use(None)
        for image in images:
            self.add(image)

    def use(self, weights: PerceptualWeights | None) -> None:
        """Talk about weights that were made (or loaded, summed, scaled) elsewhere, of one sample, in place of images.

        Raises:
            ValueError: weights of several samples.
        """
        if weights is not None and weights.n_samples != 1:
            raise ValueError(f"a conversation is about one set of weights, not {weights.n_samples}")
        self._images, self._pixels = [], None
        self._set(weights)
        self._forget()

    def clear(self) -> None:
        """Forget the turns; the images stay."""
        self.dialogue = []
        self._forget()

    def close(self) -> None:
        """Take merged weights out of the model again, bit for bit."""
        self._merged.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ask(self, question: str, **generation: Any) -> str:
        """The answer to the next question; both become turns.

        Args:
            question: The user's text.
            generation: As `generate` takes it (`max_new_tokens`, `do_sample`, `temperature`, `num_beams`, ...).
        """
        turns = [*self.dialogue, {"role": "user", "content": question}]
        prompt = self.processor.text.prompt(turns, len(self._images))
        inputs = self.processor.batch([prompt.input_ids], [[]]).to(self.model.device)
        options: dict[str, Any] = {"max_new_tokens": 256} | generation
        options["max_new_tokens"] += len(self.processor.text.answer_prefix)
        if self._kept(inputs["input_ids"], options):
            options["past_key_values"] = self._cache
        elif self._visual_tokens():  # visual tokens stand in the input itself
            assert self._pixels is not None
            owners = torch.zeros(len(self._pixels), dtype=torch.int64)
            at = owners + (prompt.image_at or (0,))[0]
            inputs |= {"pixel_values": self._pixels, "image_to_row": owners, "image_at": at}
        self._begin_merge()
        if self.weights is not None and not self.merge:
            options["perceptual_weights"] = self.weights
        elif isinstance(self._seen, VisualContext):
            options["visual_context"] = self._seen
        out = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        ids = out.sequences[0]
        new = ids[inputs["input_ids"].shape[1] :]
        answer, self.last_tokens = self.processor.answer(new), len(new)
        self.dialogue = [*turns, {"role": "assistant", "content": answer}]
        self._ids, self._cache = ids, None if options.get("num_beams", 1) > 1 else out.past_key_values
        return answer

    def stream(self, question: str, **generation: Any) -> Iterator[str]:
        """As `ask`, in pieces as they come. What is raised while it runs is raised here.

        Whoever stops reading stops the generation at the next token; the turns then stay as they were.
        """
        streamer = AnswerStreamer(self.processor)
        stopped, failed = Event(), []

        def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if stopped.is_set():
                raise _Stopped
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def run() -> None:
            try:
                self.ask(question, streamer=streamer, stopping_criteria=[stop], **generation)
            except _Stopped:
                self._forget()
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]

    def use_branch(self) -> None:
        """Take merged weights out of the model again, bit for bit, and run them beside it."""
        self.merge = False
        self._set(self._seen)

    def _set(self, seen: PerceptualWeights | VisualContext | None) -> None:
        self._merged.close()
        self._merged, self.report = ExitStack(), None
        self._seen = seen

    def _begin_merge(self) -> None:
        if self.merge and self.weights is not None and self.report is None:
            self.report = self._merged.enter_context(self.model.merged(self.weights))

    def _forget(self) -> None:
        self._cache = self._ids = None

    def _kept(self, ids: torch.Tensor, options: dict[str, Any]) -> bool:
        """Whether the cache fits: its tokens begin the new prompt. Cut to what both share."""
        cacheable = options.get("num_beams", 1) == 1 and "past_key_values" not in options
        if self._cache is None or self._ids is None or not cacheable or self._visual_tokens():
            return False
        held = self._cache.get_seq_length()
        limit = min(len(self._ids), ids.shape[1] - 1, held)
        same = int((self._ids[:limit] == ids[0, :limit]).cumprod(0).sum())
        if same == 0:
            return False
        if same < held:
            self._cache.crop(same - held)
        return True

    def _visual_tokens(self) -> bool:
        return self._seen is None and self._pixels is not None
