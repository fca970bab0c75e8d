"""Pictures and texts for miniature data sets in their real formats, and everything that can be wrong with them."""

import io
import json
import struct
import zlib

from PIL import Image

from data_prep.store.images import MAX_BYTES


def pictures(folder, count):
    """`count` different easy-VQA pictures as JPEG files of several sizes."""
    made = []
    for number in range(count):
        image = Image.open(folder / "train" / "images" / f"{number}.png").convert("RGB")
        image = image.resize((48 + number % 5 * 8, 40 + number % 3 * 8))
        made.append(encoded(image, "jpeg", quality=90))
    return made


def encoded(image, kind, **options):
    """A PIL image as a file of `kind`."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side=50_000):
    """A PNG of a few kilobytes that claims `side` x `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def text_bomb(after=False):
    """A PNG whose compressed comment, before or after its pixels, unpacks to 200 MB."""
    whole = encoded(Image.new("RGB", (8, 8)), "png")
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9))
    at = len(whole) - 12 if after else 33
    return whole[:at] + comment + whole[at:]


def _broken_png(data):
    """The picture as a PNG with a damaged byte among its pixels."""
    whole = bytearray(encoded(Image.open(io.BytesIO(data)), "png"))
    whole[whole.index(b"IDAT") + 40] ^= 0xFF
    return bytes(whole)


def _animation():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    return encoded(frames[0], "gif", save_all=True, append_images=frames[1:])


def bad_images(sound):
    """Damaged image files by the reason that must be given for each."""
    return {
        "image empty": b"",
        "not an image": b"<html><body>404 Not Found</body></html>",
        "image truncated": sound[: len(sound) * 2 // 3],
        "image corrupt": _broken_png(sound),
        "image bomb": png_bomb(),
        "image animated": _animation(),
        "image without a known white": encoded(Image.new("F", (20, 20), 0.5), "tiff"),
        "image too small": encoded(Image.new("RGB", (1, 20)), "png"),
        "image file too large": sound + bytes(MAX_BYTES),
    }


def write_json(file, records):
    """As LLaVA's files are: one array. A lone surrogate in a text goes in as an escape."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records))


def turns(*texts):
    """LLaVA turns, human first."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
