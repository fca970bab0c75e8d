"""Image bytes to normalised pixels, as the encoder's Hugging Face processor makes them, with PIL and numpy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_prep.errors import DataError
from data_prep.images import open_image, to_rgb
from data_prep.schema import digest

MODES = ("resize", "crop", "pad")


@dataclass(frozen=True)
class PixelPreprocessor:
    """One image file -> float32 [3, size, size].

    Attributes:
        mode: ``resize`` distorts to the square; ``crop`` scales the shortest edge and cuts the centre out; ``pad`` adds
            margins of the encoder's mean colour to make a square, then scales (LLaVA-1.5).
        size: side of the result in pixels.
        shortest_edge: side that ``crop`` scales to before it cuts; some encoders cut 224 out of 256.
        mean, std: per channel, of pixels in [0, 1].
        resample: Pillow's filter number.
        rescale: factor from bytes to the range of ``mean``.
    """

    mode: str
    size: int
    shortest_edge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255

    @property
    def fingerprint(self) -> str:
        """Of all settings."""
        return digest([type(self).__name__, *(getattr(self, name) for name in self.__dataclass_fields__)])

    def __call__(self, data: bytes) -> Tensor:
        """Pixels of one image file.

        Raises:
            ImageError: the bytes are no sound image.
        """
        image = to_rgb(open_image(data))
        if self.mode == "resize":
            image = image.resize((self.size, self.size), self.resample)
        elif self.mode == "pad":
            image = self._pad(image).resize((self.size, self.size), self.resample)
        else:
            image = self._crop(image)
        pixels = np.asarray(image, dtype=np.float32)
        # (x * rescale - mean) / std as one multiplication and one addition, in place.
        scale = np.float32(self.rescale) / np.asarray(self.std, dtype=np.float32)
        shift = -np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
        pixels = pixels * scale
        pixels += shift
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def _crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(self.shortest_edge * long / short)
        new = (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)
        if new != image.size:
            image = image.resize(new, self.resample)
        left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def load_preprocessor(path: str | Path, mode: str, size: int | None = None) -> PixelPreprocessor:
    """Settings from an encoder's ``preprocessor_config.json``.

    Args:
        path: folder of the encoder, or its Hugging Face name.
        mode: one of ``MODES``.
        size: side in pixels; default the encoder's own. ``crop`` keeps the encoder's ratio of shortest edge to crop.

    Raises:
        DataError: no such file, or an unknown mode.
    """
    if mode not in MODES:
        raise DataError(f"image_mode={mode}: no such mode; there are {', '.join(MODES)}")
    settings = _settings(path)
    resized = settings.get("size", {})
    if isinstance(resized, int):
        resized = {"shortest_edge": resized}
    shortest = resized.get("shortest_edge") or resized.get("height")
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if isinstance(crop, dict):
        crop = crop.get("height")
    own = crop or shortest
    if own is None or "image_mean" not in settings:
        raise DataError(f"preprocessor_config.json of {path} names no size or no image_mean")
    size = size or own
    return PixelPreprocessor(
        mode=mode,
        size=size,
        shortest_edge=round(shortest * size / own),
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        resample=settings.get("resample", 3),
        rescale=settings.get("rescale_factor", 1 / 255),
    )


def _settings(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "preprocessor_config.json"
    if not file.is_file() and not Path(path).exists() and str(path).count("/") <= 1:
        from transformers.utils import cached_file

        file = Path(cached_file(str(path), "preprocessor_config.json"))
    if not file.is_file():
        raise DataError(f"{file} is missing: the encoder's folder must hold its image processor's settings")
    return json.loads(file.read_text())
