"""Images that requests bring: decoded within bounds, and their weights kept by content in a bounded cache."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import torch
from torch import Tensor

from data_prep.store.errors import DataError
from data_prep.store.images import open_image, read_image, to_rgb
from model.decoder.cross_attention import VisualContext
from model.generator.weights import PerceptualWeights
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAProcessor, decode_data_uri

Seen = PerceptualWeights | VisualContext
"""What a model sees in images, in a form that is kept: see `VLoRAForConditionalGeneration.look`."""


@dataclass(frozen=True)
class SeenImage:
    """An image of a request.

    Attributes:
        key: sha256 of its file.
        pixels: Float [n, 3, H, W], its views as the encoder reads them.
    """

    key: str
    pixels: Tensor


@dataclass(frozen=True)
class Sources:
    """Where images may come from besides data URIs.

    Attributes:
        prefixes: Beginnings of `https://` or `http://` URLs and of `file:///` paths that requests may name.
        max_bytes, max_pixels: Of one image.
    """

    prefixes: tuple[str, ...] = ()
    max_bytes: int = 16 << 20
    max_pixels: int = 25_000_000

    def read(self, url: str) -> bytes:
        """The image file that a request names.

        Raises:
            DataError: not allowed, too large, or not there.
        """
        if url.startswith("data:"):
            data = decode_data_uri(url)
        elif url.startswith("file://"):
            data = self._file(url)
        elif url.startswith(("http://", "https://")):
            data = self._fetched(url)
        else:
            raise DataError("an image is given as a data URI: data:image/png;base64,...")
        if len(data) > self.max_bytes:
            raise DataError(f"the image has {len(data)} bytes; at most {self.max_bytes} are taken")
        return data

    def _file(self, url: str) -> bytes:
        path = Path(unquote(urlparse(url).path)).resolve()
        allowed = [Path(unquote(urlparse(p).path)).resolve() for p in self.prefixes if p.startswith("file://")]
        if not any(path.is_relative_to(folder) for folder in allowed):
            raise DataError("this server opens no file that a request names; send the image as a data URI")
        return read_image(path)

    def _fetched(self, url: str) -> bytes:
        parts = urlparse(url)
        for prefix in self.prefixes:
            own = urlparse(prefix)
            same = (parts.scheme, parts.netloc) == (own.scheme, own.netloc)
            if same and parts.path.startswith(own.path) and ".." not in unquote(parts.path):
                break
        else:
            raise DataError("this server fetches no URL that a request names; send the image as a data URI")
        import httpx

        data = b""
        try:
            with httpx.stream("GET", url, follow_redirects=False, timeout=10) as answer:
                if answer.status_code != 200:
                    raise DataError(f"the image's URL answered {answer.status_code}")
                for chunk in answer.iter_bytes():
                    data += chunk
                    if len(data) > self.max_bytes:
                        break
        except httpx.HTTPError as error:
            raise DataError(f"the image's URL cannot be read ({type(error).__name__})") from error
        return data

    def see(self, url: str, processor: VLoRAProcessor) -> SeenImage:
        """Read and decode the image that a request names.

        Raises:
            DataError: also: not a sound image, or one of too many pixels.
        """
        data = self.read(url)
        image = to_rgb(open_image(data, self.max_pixels))
        settings = processor.image_processor.pixels
        views = [np.asarray(view) for view in settings.views(image)]
        return SeenImage(hashlib.sha256(data).hexdigest(), settings.batch(views))


class ImageCache:
    """Weights (or features) of the images seen last, by content. Used by the model's thread alone.

    Args:
        max_bytes: Of all of them together.

    Attributes:
        hits, misses: Counted, for metrics.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[str, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def look(
        self, model: VLoRAForConditionalGeneration, each: Sequence[Sequence[SeenImage]]
    ) -> list[Seen | Tensor | None]:
        """What the model needs of the images of several requests.

        Returns:
            For each request what the model sees in its images together; for a connector with visual tokens, their
            pixels; None without images.
        """
        if model.model.connector.visual_tokens:
            dtype = next(model.encoder.parameters()).dtype
            pixels = [torch.cat([image.pixels for image in images]) if images else None for images in each]
            return [None if one is None else one.to(model.device, dtype) for one in pixels]
        made: dict[str, Any] = self._seen(model, [image for images in each for image in images])
        summed: list[Seen | Tensor | None] = []
        for images in each:
            found = [made[image.key] for image in images]
            summed.append(functools.reduce(operator.add, found) if found else None)
        return summed

    def _seen(self, model: VLoRAForConditionalGeneration, images: list[SeenImage]) -> dict[str, Seen]:
        """What the model sees in each image, by key; those that are not kept are encoded together."""
        new = {image.key: image for image in images if image.key not in self._kept}
        self.misses += len(new)
        self.hits += len(images) - len(new)
        found = {image.key: self._kept[image.key] for image in images if image.key not in new}
        if new:
            views = torch.tensor([len(image.pixels) for image in new.values()])
            pixels = torch.cat([image.pixels for image in new.values()]).to(model.device)
            made = model.look(pixels, torch.arange(len(new)).repeat_interleave(views), len(new))
            found |= {key: seen for key, seen in zip(new, made, strict=True) if seen is not None}
        for key, seen in found.items():
            if key in new:
                self._kept[key] = seen
                self.bytes += seen.nbytes
            self._kept.move_to_end(key)
        while self.bytes > self.max_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.bytes -= oldest.nbytes
        return found
