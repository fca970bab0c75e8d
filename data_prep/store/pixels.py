"""Image bytes to normalised pixels, as the encoder's Hugging Face processor makes them, with PIL and numpy alone."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import digest
from common.settings import check
from data_prep.store.errors import DataError
from data_prep.store.images import WHITE, open_image, to_rgb
from model.config import VisionConfig
from model.loading import pretrained_config
from model.pretrained import fetch_hint, find_source
from model.vision import image_size

MAX_CANVAS = 64 << 20
"""Pixels of the largest picture made on the way to a view. Long strips would need more (a file of a hundred bytes, some
gigabytes): they are cut or scaled in another order than the processors have, which only rounds differently."""


class ImageInput(ABC):
    """What the model gets of an image file: pixels (`PixelPreprocessor`) or cached features (`FeatureCache`).

    In two steps, so that the numbers are written once, into the batch.

    Attributes:
        dtype: Of the batch.
    """

    dtype: torch.dtype

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one view, [3, H, W] or [P, V]."""

    @abstractmethod
    def read(self, data: bytes) -> list[np.ndarray]:
        """The views of one image file, as they come; one but for tiles.

        Raises:
            ImageError, DataError: it cannot be read.
        """

    @abstractmethod
    def write(self, views: list[np.ndarray], out: Tensor) -> None:
        """Views that were read into `out` [n, *shape]."""

    def __call__(self, data: bytes) -> Tensor:
        """The views of one image file: [n, *shape]."""
        return self.batch(self.read(data))

    def batch(self, views: list[np.ndarray]) -> Tensor:
        """Views that were read: [n, *shape]."""
        out = torch.empty(len(views), *self.shape, dtype=self.dtype)
        self.write(views, out)
        return out

    def dummy(self) -> Tensor:
        """What a batch without images carries, with weight 0: zeros [1, *shape]."""
        return torch.zeros(1, *self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class PixelPreprocessor(ImageInput):
    """One image file -> its views, float32 [n, 3, size, size].

    Attributes:
        mode: `resize` distorts to the square; `crop` scales the shortest edge and cuts the centre out; `pad` adds
            margins of the encoder's mean colour to make a square, then scales (LLaVA-1.5); `tiles` gives the image
            distorted to the square and, after it, row by row, the tiles of the grid that suits it best (LLaVA-NeXT).
            n is 1 but for `tiles`.
        size: Side of a view in pixels.
        shortest_edge: Side that `crop` scales to before it cuts; some encoders cut 224 out of 256.
        mean, std: Per channel, of pixels in [0, 1].
        resample: Pillow's filter number.
        rescale: Factor from bytes to the range of `mean`.
        max_tiles: Largest rows * columns of a grid.
        transparent: What shows through transparent pixels: `white`, the `mean` colour of the encoder, or (`drop`) the
            colour that is stored under them.
    """

    dtype = torch.float32

    mode: str
    size: int
    shortest_edge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255
    max_tiles: int = 4
    transparent: str = "white"

    @property
    def fingerprint(self) -> str:
        """Of all settings that the mode reads."""
        names = [name for name in self.__dataclass_fields__ if name != "max_tiles" or self.mode == "tiles"]
        return digest([type(self).__name__, *(getattr(self, name) for name in names)])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.size, self.size

    def read(self, data: bytes) -> list[np.ndarray]:
        """Views of one image file, uint8 [size, size, 3].

        Raises:
            ImageError: the bytes are no sound image.
        """
        return [np.asarray(view) for view in self.views(self.picture(data))]

    def picture(self, data: bytes) -> Image.Image:
        """One image file as it is shown to the model: upright, RGB, on the background of `transparent`.

        Raises:
            ImageError: the bytes are no sound image.
        """
        background = {"white": WHITE, "mean": self._mean_colour, "drop": None}[self.transparent]
        return to_rgb(open_image(data), background)

    @property
    def _mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def write(self, views: list[np.ndarray], out: Tensor) -> None:
        """Views that were read into `out` [n, 3, size, size], normalised."""
        # (x * rescale - mean) / std as one multiplication and one addition, from bytes straight to where they stay.
        scale = np.float32(self.rescale) / np.asarray(self.std, dtype=np.float32)
        shift = -np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
        for view, planes in zip(views, out.numpy(), strict=True):
            for channel, plane in enumerate(planes):
                np.multiply(view[..., channel], scale[channel], out=plane)
                plane += shift[channel]

    def views(self, image: Image.Image) -> list[Image.Image]:
        """An RGB image's views before they become numbers."""
        match self.mode:
            case "resize":
                return [self._square(image)]
            case "pad":
                return [self._padded(image)]
            case "crop":
                return [self._crop(image)]
            case _:
                return [self._square(image), *self._tiles(image)]

    def _square(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), self.resample)

    def _padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return self._square(image)
        if max(width, height) ** 2 > MAX_CANVAS:  # a strip: scaled first, then the margins
            image = image.resize(fit(image.size, (self.size, self.size)), self.resample)
            square = Image.new("RGB", (self.size, self.size), self._mean_colour)
            square.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
            return square
        across = side = max(width, height)
        if width > height:
            # Pillow scales a square's columns before its rows, and the margins above and below are of one colour before
            # and after it: they can be added in between.
            across = self.size
            image = image.resize((across, height), self.resample)
        square = Image.new("RGB", (across, side), self._mean_colour)
        square.paste(image, ((across - image.width) // 2, (side - height) // 2))
        return self._square(square)

    def _crop(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        longer = int(self.shortest_edge * max(width, height) / min(width, height))
        new = (self.shortest_edge, longer) if width <= height else (longer, self.shortest_edge)
        left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        ends = left * width / new[0], (left + self.size) * width / new[0]
        if new[0] * new[1] > MAX_CANVAS:  # a strip: cut first, then scaled
            rows = top * height / new[1], (top + self.size) * height / new[1]
            return image.resize((self.size, self.size), self.resample, (ends[0], rows[0], ends[1], rows[1]))
        # Wide images are cut before all is scaled. Not upright ones, whose rows Pillow may scale before their columns:
        # the pixels would not be those of scaling all and then cutting.
        if width > height and new[1] == self.size and all(float(np.float32(end)) == end for end in ends):
            # All 4:3 photographs; elsewhere Pillow, which reads the box in single precision, would move it.
            return image.resize((self.size, self.size), self.resample, (ends[0], 0, ends[1], height))
        if width > height:  # between the scaling of columns and that of rows
            image = image.resize((new[0], height), self.resample).crop((left, 0, left + self.size, height))
            left, new = 0, (self.size, new[1])
        if new != image.size:
            image = image.resize(new, self.resample)
        return image.crop((left, top, left + self.size, top + self.size))

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        """The image as large as it fits into its grid, in the middle of black, cut into tiles."""
        columns, rows = best_grid(image.size, self.size, self.max_tiles)
        width, height = columns * self.size, rows * self.size
        new_width, new_height = fit(image.size, (width, height))
        canvas = Image.new("RGB", (width, height))
        scaled = image.resize((new_width, new_height), self.resample)
        canvas.paste(scaled, ((width - new_width) // 2, (height - new_height) // 2))
        size = self.size
        return [
            canvas.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
            for row in range(rows)
            for column in range(columns)
        ]


def fit(size: tuple[int, int], into: tuple[int, int]) -> tuple[int, int]:
    """Largest (width, height) of the shape of `size` inside `into`; the shorter side is rounded up."""
    (width, height), (most_wide, most_high) = size, into
    if most_wide / width < most_high / height:
        return most_wide, min(math.ceil(height * (most_wide / width)), most_high)
    return min(math.ceil(width * (most_high / height)), most_wide), most_high


def grids(max_tiles: int) -> list[tuple[int, int]]:
    """All (columns, rows) of 2 to `max_tiles` tiles, those of fewer first."""
    found = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1) if c * r > 1]
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def best_grid(size: tuple[int, int], tile: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) that keep most of an image's pixels and, among these, leave least of the grid empty.

    Source: LLaVA-NeXT's choice of resolution (`select_best_resolution`).
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        width, height = grid[0] * tile, grid[1] * tile
        scale = min(width / size[0], height / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(grids(max_tiles), key=merit)


def most_views(vision: VisionConfig) -> int:
    """Views of an image at most."""
    return 1 + vision.max_tiles if vision.image_mode == "tiles" else 1


def load_preprocessor(vision: VisionConfig) -> PixelPreprocessor:
    """Settings from an encoder's `preprocessor_config.json`.

    Args:
        vision: Whose `path`, `image_mode`, `image_size` (null: the encoder's own; `crop` keeps the encoder's
            ratio of shortest edge to crop) and `max_tiles` are read.

    Raises:
        ConfigError: a value that a key does not take.
        DataError: no such file.
    """
    check(vision, "vision.")
    folder = find_source("vision", vision.path)
    if folder is None:
        raise DataError(f"vision.path={vision.path} is not on this machine; {fetch_hint('vision', vision.path)}")
    settings = _settings(folder)
    resized = settings.get("size", {})
    if isinstance(resized, int):
        resized = {"shortest_edge": resized}
    shortest = resized.get("shortest_edge") or resized.get("height")
    crop = settings.get("crop_size") if settings.get("do_center_crop") else None
    if isinstance(crop, dict):
        crop = crop.get("height")
    own = crop or shortest
    if own is None or "image_mean" not in settings:
        raise DataError(f"preprocessor_config.json of {folder} names no size or no image_mean")
    size = _size(vision, folder) or own
    return PixelPreprocessor(
        mode=vision.image_mode,
        size=size,
        shortest_edge=round(shortest * size / own),
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
        resample=settings.get("resample", 3),
        rescale=settings.get("rescale_factor", 1 / 255),
        max_tiles=vision.max_tiles,
        transparent=vision.transparent,
    )


def _size(vision: VisionConfig, folder: Path) -> int | None:
    """The model's, not always its processor's (DINOv2 was trained at 518 and crops to 224). None where no configuration
    lies beside the processor's.
    """
    if not (folder / "config.json").is_file():
        return vision.image_size
    hf = pretrained_config("vision", str(folder), vision.architecture)
    return image_size(vision, hf) if hasattr(hf, "image_size") else vision.image_size


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise DataError(f"{file} is missing: the encoder's folder must hold its image processor's settings")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} cannot be read ({error}); copy it again") from error
