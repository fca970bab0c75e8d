"""Images and conversations to model inputs, and answers to text, exactly as in training."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from data_prep.store.errors import DataError
from data_prep.store.images import open_image, read_image, to_rgb
from data_prep.store.pixels import PixelPreprocessor
from data_prep.store.sample import Dialogue
from data_prep.text.dialogues import from_parts
from data_prep.text.encoder import TextEncoder

Picture: TypeAlias = Image.Image | bytes | str | Path | np.ndarray | Tensor
"""An image: decoded, an encoded file's bytes, a path, a URL, a data URI, or uint8 [H, W, 3] (tensors: [3, H, W])."""


def open_picture(picture: Picture) -> Image.Image:
    """Any accepted form of an image, upright and in RGB.

    Raises:
        ImageError: not a sound image, or no such file.
        DataError: an array of another shape or type, or broken base64.
    """
    match picture:
        case Image.Image():
            return to_rgb(picture)
        case bytes():
            return to_rgb(open_image(picture))
        case np.ndarray() | Tensor():
            return _from_array(picture)
        case str() if picture.startswith(("http://", "https://")):
            return to_rgb(load_image(picture))
        case str() if picture.startswith("data:"):
            return to_rgb(open_image(decode_data_uri(picture)))
        case _:
            return to_rgb(open_image(read_image(Path(picture))))


def decode_data_uri(uri: str) -> bytes:
    """Bytes of `data:image/...;base64,...`.

    Raises:
        DataError: another kind of URI, or broken base64.
    """
    head, comma, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise DataError("an image is given as data:image/TYPE;base64,... ; this is another kind of URI")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image's base64 is broken ({error})") from error


def _from_array(picture: np.ndarray | Tensor) -> Image.Image:
    array = picture.permute(1, 2, 0).numpy() if isinstance(picture, Tensor) else picture
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise DataError(f"an image array is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array))


class VLoRAImageProcessor(BaseImageProcessor):
    """Images to pixels; its settings are those of `PixelPreprocessor`."""

    model_input_names = ["pixel_values"]

    def __init__(self, **settings: Any) -> None:
        known = {field.name for field in fields(PixelPreprocessor)}
        pixels = {key: settings.pop(key) for key in list(settings) if key in known}
        super().__init__(**settings)
        for key, value in pixels.items():
            setattr(self, key, value)

    @classmethod
    def of(cls, pixels: PixelPreprocessor) -> VLoRAImageProcessor:
        """With the settings of a run."""
        return cls(**{f.name: getattr(pixels, f.name) for f in fields(pixels)})

    @property
    def pixels(self) -> PixelPreprocessor:
        """The settings as training knows them."""
        given: dict[str, Any] = {}
        for field in fields(PixelPreprocessor):
            if hasattr(self, field.name):
                value = getattr(self, field.name)
                given[field.name] = tuple(value) if isinstance(value, list) else value
        return PixelPreprocessor(**given)

    def __call__(self, images: Picture | list[Picture], return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """`pixel_values` float32 [n, 3, size, size] of the views of all images, and `num_views` int64 [images].

        Raises:
            DataError: one of them is no sound image.
        """
        pixels = self.pixels
        listed = images if isinstance(images, list | tuple) else [images]
        found = [[np.asarray(view) for view in pixels.views(open_picture(image))] for image in listed]
        values = pixels.batch([view for views in found for view in views])
        return BatchFeature({"pixel_values": values, "num_views": torch.tensor([len(views) for views in found])})

    preprocess = __call__


class VLoRAProcessor(ProcessorMixin):
    """Conversations with images to model inputs, and token ids to answers.

    Args:
        image_processor: Settings of the pixels.
        tokenizer: The language model's.
        template: Text template of the training (`data_prep.text.templates`).
        chat_template: The same as a Jinja template, for programs that render text themselves.
    """

    def __init__(
        self,
        image_processor: VLoRAImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "chat",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.template = template
        self.text = TextEncoder(tokenizer, template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """transformers looks classes up among its own modules; ours are none of them."""
        expected = {"image_processor": VLoRAImageProcessor, "tokenizer": PreTrainedTokenizerBase}[argument_name]
        if not isinstance(argument, expected):
            raise TypeError(f"{argument_name} is a {type(argument).__name__}, not a {expected.__name__}")
        return expected

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_to_row", "image_at"]

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **options: Any) -> BatchFeature:
        """Inputs for rendered prompts; for questions and conversations see `apply_chat_template`.

        Args:
            images: One image, a list (all of them in a single prompt's row; one for each of several), or a list of
                lists, one per prompt.
            text: One prompt or several, tokenised as they are: special tokens in them count.

        Returns:
            As `batch`.

        Raises:
            ValueError: no text, or lists that do not fit.
        """
        if text is None:
            raise ValueError("give text=; to encode images alone use processor.image_processor(images)")
        prompts = [text] if isinstance(text, str) else list(text)
        bos = self.tokenizer.bos_token
        rows = [self.tokenizer(p, add_special_tokens=not (bos and p.startswith(bos))).input_ids for p in prompts]
        return self.batch(rows, _per_prompt(images, len(prompts)))

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tokenize: bool = False, **options: Any
    ) -> Any:
        """A conversation, or a list of them, as inputs (`tokenize=True, return_dict=True`), token ids or text.

        Contents are texts, or lists of `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (also
        `url`, `path`, `base64`, or OpenAI's `image_url`). All images of a conversation count for all of its text;
        with visual tokens, each stands at its place in it.

        Raises:
            DataError: turns the template cannot render, or an image that cannot be read.
            ValueError: an answer that is to be continued.
        """
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = [split_images(chat) for chat in (conversation if several else [conversation])]
        dialogues = [dialogue for dialogue, _ in chats]
        if options.get("continue_final_message"):
            raise ValueError("an answer that is to be continued is not supported: end the conversation with a question")
        if not tokenize:
            text = dialogues if several else dialogues[0]
            return super().apply_chat_template(text, chat_template=chat_template, tokenize=False, **options)
        asking = options.get("add_generation_prompt", False) or dialogues[0][-1]["role"] != "assistant"
        encode = self.text.prompt if asking else self.text.encode
        encoded = [encode(dialogue, len(images)) for dialogue, images in chats]
        rows = [row.input_ids for row in encoded]
        if not options.get("return_dict", False):
            return rows if several else rows[0]
        return self.batch(rows, [images for _, images in chats], [row.image_at for row in encoded])

    def batch(
        self, rows: list[list[int]], images: list[list[Picture]], places: Sequence[Sequence[int]] | None = None
    ) -> BatchFeature:
        """Token rows, padded on the left, and their images.

        Args:
            rows: Token ids of each row.
            images: Its images.
            places: In front of which token of its row each image stands; None: all in front of it.

        Returns:
            `input_ids` and `attention_mask` int64 [R, L]; where there are images also `pixel_values` float32
            [n, 3, size, size], `image_to_row` int64 [n] and `image_at` int64 [n], the column each stands in front of.
        """
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.text.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[number, length - len(row) :] = 1
        out = BatchFeature({"input_ids": ids, "attention_mask": mask})
        if any(images):
            flat = [(number, image) for number, found in enumerate(images) for image in found]
            encoded = self.image_processor([image for _, image in flat])
            out["pixel_values"] = encoded["pixel_values"]
            owners = torch.tensor([number for number, _ in flat], dtype=torch.int64)
            out["image_to_row"] = owners.repeat_interleave(encoded["num_views"])
            at = [
                length - len(row) + place
                for row, found, where in zip(rows, images, places or [() for _ in rows], strict=True)
                for place in where or [0] * len(found)
            ]
            out["image_at"] = torch.tensor(at, dtype=torch.int64).repeat_interleave(encoded["num_views"])
        return out

    def answer(self, ids: Tensor | list[int]) -> str:
        """Text of generated ids [L] up to the end of the answer."""
        return self.text.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids))


def split_images(chat: list[dict[str, Any]]) -> tuple[Dialogue, list[Picture]]:
    """The turns of a conversation as text, and its images in order.

    Of several images the text has an image token where each stands (`data_prep.text.dialogues.says_where`).

    Raises:
        DataError: content of an unknown type.
    """
    said: list[tuple[str, list[str | None]]] = []
    images: list[Picture] = []
    for number, turn in enumerate(chat):
        content = turn["content"]
        parts: list[str | None] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item.get("type") == "text":
                parts.append(item["text"])
            elif item.get("type") in ("image", "image_url"):
                images.append(_picture_of(item, number))
                parts.append(None)
            else:
                raise DataError(f"turn {number}: content of type {item.get('type')!r}; there are text and image")
        said.append((turn["role"], parts))
    return from_parts(said), images


def _picture_of(item: dict[str, Any], turn: int) -> Picture:
    if isinstance(item.get("image_url"), dict):
        return item["image_url"]["url"]
    if "base64" in item:
        return decode_data_uri(f"data:image/any;base64,{item['base64']}")
    for key in ("image", "url", "path", "image_url"):
        if item.get(key) is not None:
            return item[key]
    raise DataError(f"turn {turn}: an image without image, url, path or base64")


def _per_prompt(images: Any, count: int) -> list[list[Picture]]:
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple):
        images = [images]
    if images and isinstance(images[0], list | tuple):
        found = [list(each) for each in images]
    else:
        found = [list(images)] if count == 1 else [[image] for image in images]
    if len(found) != count:
        raise ValueError(f"{count} prompts, but images for {len(found)}; give a list of images for each prompt")
    return found
