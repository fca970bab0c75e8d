"""Decoding untrusted image bytes: the one place where preparation and training open an image."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.store.errors import Defect

MAX_PIXELS = 178_956_970
"""Largest accepted area: a quarter of a gigapixel-sized RGB buffer, Pillow's own bomb limit at its error level."""

MAX_BYTES = 64 << 20
"""Largest accepted image file."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow readers that untrusted bytes may reach; others (EPS runs Ghostscript) are refused."""
Image.init()  # or naming a reader that Pillow has not loaded yet is a KeyError

ORIENTATION = 0x0112


class ImageError(Defect):
    """An image file that is missing, or bytes that are no sound image; `detail` has the decoder's own words."""


def read_image(file: Path) -> bytes:
    """Bytes of an image file.

    Raises:
        ImageError: missing, no file, or larger than `MAX_BYTES`.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ImageError("image missing", str(file)) from error
    except OSError as error:
        raise ImageError("image file unreadable", f"{file}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ImageError("image file too large", f"{file}: above {MAX_BYTES} bytes")
    return data


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode `data` completely, in the file's own colour mode and orientation.

    Args:
        data: An encoded image file.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        ImageError: empty, not an image, a format that is not read, truncated or corrupt, a decompression bomb,
            animated, or of pixels whose range no one knows.
    """
    if not data:
        raise ImageError("image empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit below decides, and odd EXIF is not an error
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ImageError("not an image", f"{len(data)} bytes starting with {data[:8]!r}") from error
        except Image.DecompressionBombError as error:
            raise ImageError("image bomb", str(error)) from error
        except (OSError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error, MemoryError) as error:
            raise ImageError("image corrupt", str(error)) from error
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("image bomb", f"{width} x {height} pixels, at most {max_pixels} are accepted")
        try:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a JPEG with previews behind it
                raise ImageError("image animated", f"{image.n_frames} frames")
            image.load()
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("image bomb", str(error)) from error
        except Exception as error:  # Pillow's plugins raise nearly anything on broken data
            truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
            raise ImageError("image truncated" if truncated else "image corrupt", str(error)) from error
    if image.mode in ("I", "F"):
        raise ImageError("image without a known white", f"32-bit pixels of mode {image.mode}, from {image.format}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright (EXIF orientation applied) and in RGB, which drops an alpha channel.

    The conversion is Pillow's, as in the Hugging Face image processors, but for 16-bit grey: Pillow would make
    everything above 255 white.
    """
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(data: bytes, side: int, quality: int) -> bytes:
    """The image with its shorter side at most `side` pixels: `data` itself where it is, else a new JPEG file.

    Raises:
        ImageError: the bytes are no sound image.
    """
    image = open_image(data)
    if min(image.size) <= side:
        return data
    image = to_rgb(image)
    scale = side / min(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def describe(image: Image.Image) -> dict[str, str]:
    """What a report counts about a sound image: format, mode and peculiarities."""
    upright = image.getexif().get(ORIENTATION, 1) == 1
    alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    return {
        "format": image.format or "unknown",
        "mode": image.mode,
        "orientation": "upright" if upright else "turned by EXIF",
        "alpha": "yes" if alpha else "no",
    }
