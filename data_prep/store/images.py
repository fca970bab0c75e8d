"""Decoding untrusted image bytes: the one place where preparation and training open an image."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.store.errors import Defect

MAX_PIXELS = 178_956_970
"""Largest accepted area: a quarter of a gigapixel-sized RGB buffer, Pillow's own bomb limit at its error level."""

MAX_BYTES = 64 << 20
"""Largest accepted image file."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow readers that untrusted bytes may reach; others (EPS runs Ghostscript) are refused."""
Image.init()  # or naming a reader that Pillow has not loaded yet is a KeyError

ORIENTATION = 0x0112
_UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns the stored pixels upright."""
WHITE = (255, 255, 255)
_PNG = b"\x89PNG\r\n\x1a\n"


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
    try:
        image = _decode(data, max_pixels)
    except ImageError as error:
        # Pillow unpacks at most a megabyte of a PNG's colour profile or comment. Its pixels may be sound all the same.
        if error.reason != "image corrupt" or (bare := _without_metadata(data)) is None:
            raise
        image = _decode(bare, max_pixels)
    if image.mode in ("I", "F"):
        raise ImageError("image without a known white", f"32-bit pixels of mode {image.mode}, from {image.format}")
    return image


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit below decides, and odd EXIF is not an error
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ImageError("not an image", f"{len(data)} bytes starting with {data[:8]!r}") from error
        except Image.DecompressionBombError as error:
            raise ImageError("image bomb", str(error)) from error
        except Exception as error:  # Pillow's plugins raise nearly anything on broken data
            raise ImageError("image corrupt", str(error)) from error
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("image bomb", f"{width} x {height} pixels, at most {max_pixels} are accepted")
        try:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a JPEG with previews behind it
                raise ImageError("image animated", f"{frames} frames")
            image.load()
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("image bomb", str(error)) from error
        except Exception as error:
            truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
            raise ImageError("image truncated" if truncated else "image corrupt", str(error)) from error
    return image


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG file without its texts and colour profile; none where there are none to leave out."""
    if not data.startswith(_PNG):
        return None
    kept, at = [data[: len(_PNG)]], len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at : at + 12 + length])
        at += 12 + length
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 (upright) to 8; 1 where it has none or its EXIF is broken.

    The one place that reads EXIF: nothing else in it matters to the picture, and what is odd there is no defect.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's reader raises nearly anything on a broken EXIF
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def upright(image: Image.Image, pixels: Image.Image | None = None) -> Image.Image:
    """`pixels` (default the image's own) turned and mirrored as the EXIF orientation of `image` says."""
    pixels = image if pixels is None else pixels
    turn = _UPRIGHT[orientation(image)]
    return pixels if turn is None else pixels.transpose(turn)


def with_alpha(image: Image.Image) -> Image.Image | None:
    """`image` in RGBA where its file says which pixels are transparent, in whatever form; none where it does not."""
    key = image.info.get("transparency")
    if image.mode in ("RGBA", "LA", "PA"):
        return image.convert("RGBA")
    if image.mode in ("RGBa", "La"):
        return image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode]).convert("RGBA")
    if key is None:
        return None
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        opaque = np.where(values == key, 0, 255).astype(np.uint8) if isinstance(key, int) else np.uint8(255)
        grey = (values >> 8).astype(np.uint8)
        return Image.fromarray(np.stack([grey, grey, grey, np.broadcast_to(opaque, grey.shape)], -1))
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit colours, of which Pillow keeps the upper half
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image.convert("RGBA")


def to_rgb(image: Image.Image, background: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """`image` upright (EXIF orientation applied) and in RGB.

    The conversion is Pillow's, as in the Hugging Face image processors, but for 16-bit grey: Pillow would make
    everything above 255 white.

    Args:
        image: As `open_image` gives it.
        background: Colour that shows through transparent pixels; none: the colour that is stored under them, which
            nobody has ever seen, shows instead (what CLIP's processor does).
    """
    clear = with_alpha(image) if background is not None else None
    if clear is not None:
        pixels = Image.new("RGB", image.size, background)
        pixels.paste(clear, mask=clear.getchannel("A"))
    elif image.mode.startswith("I;16"):
        pixels = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    else:
        pixels = image
    return upright(image, pixels if pixels.mode == "RGB" else pixels.convert("RGB"))


def shrink(data: bytes, side: int, quality: int) -> bytes:
    """The image with its shorter side at most `side` pixels: `data` itself where it is, else a new file, upright.

    JPEG, or PNG where it has transparent pixels.

    Raises:
        ImageError: the bytes are no sound image.
    """
    image = open_image(data)
    if min(image.size) <= side:
        return data
    scale = side / min(image.size)
    transparent = is_transparent(image)
    image = upright(image, with_alpha(image)) if transparent else to_rgb(image)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if transparent:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def is_transparent(image: Image.Image) -> bool:
    """Whether something shows through any pixel."""
    clear = with_alpha(image)
    if clear is None:
        return False
    lowest: Any = clear.getchannel("A").getextrema()[0]  # a number: one channel
    return lowest < 255


def describe(image: Image.Image) -> dict[str, str]:
    """What a report counts about a sound image: format, mode and peculiarities."""
    return {
        "format": image.format or "unknown",
        "mode": image.mode,
        "orientation": "upright" if orientation(image) == 1 else "turned by EXIF",
        "alpha": "transparent" if is_transparent(image) else "no",
    }
