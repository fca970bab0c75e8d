"""Images of every kind, hostile ones, the report, and re-encoding on request."""

import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_prep import report
from data_prep.prepare import Options, prepare
from data_prep.store.images import (
    ORIENTATION,
    ImageError,
    describe,
    open_image,
    orientation,
    read_image,
    shrink,
    to_rgb,
)
from data_prep.store.sample import Count, Dropped, Sample
from data_prep.store.split import Split
from data_prep.text.dialogues import exchange
from data_prep.verify import Verifier, bucket
from tests.data_prep.miniature import bad_images, encoded, pictures, png_bomb, text_bomb


@pytest.fixture(scope="module")
def photo(part):
    return pictures(part("easy_vqa"), 1)[0]


def gradient(size=(40, 20)):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([x * 6, y * 6, x + y], -1).astype(np.uint8))


class Given:
    """A source of given items."""

    def __init__(self, items):
        self.items = items

    def made_from(self):
        return {"items": len(self.items)}

    def plan(self):
        return {"train": [None]}

    def read(self, split, unit):
        return iter(self.items)


def test_kinds_of_images_are_told_apart():
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        ("JPEG", "RGB", "upright", "no"): encoded(gradient(), "jpeg"),
        ("JPEG", "RGB", "turned by EXIF", "no"): encoded(gradient(), "jpeg", exif=turned),
        ("JPEG", "CMYK", "upright", "no"): encoded(gradient().convert("CMYK"), "jpeg"),
        ("JPEG", "L", "upright", "no"): encoded(gradient().convert("L"), "jpeg"),
        ("PNG", "P", "upright", "no"): encoded(gradient().quantize(), "png"),
        ("PNG", "P", "upright", "transparent"): encoded(gradient().quantize(), "png", transparency=0),
        ("PNG", "RGBA", "upright", "no"): encoded(gradient().convert("RGBA"), "png"),
        ("PNG", "I;16", "upright", "no"): encoded(Image.fromarray(np.full((20, 40), 9000, np.uint16)), "png"),
        ("GIF", "P", "upright", "no"): encoded(gradient().quantize(), "gif"),
        ("WEBP", "RGB", "upright", "no"): encoded(gradient(), "webp"),
        ("BMP", "RGB", "upright", "no"): encoded(gradient(), "bmp"),
        ("TIFF", "RGB", "upright", "no"): encoded(gradient(), "tiff"),
    }
    for expected, data in kinds.items():
        image = open_image(data)
        assert tuple(describe(image).values()) == expected
        assert to_rgb(image).mode == "RGB"
        assert image.mode != "I;16" or np.unique(np.asarray(to_rgb(image))).tolist() == [9000 >> 8]
        assert to_rgb(image).size == ((20, 40) if expected[2] != "upright" else (40, 20))
    samples = [Sample(f"s{n}", [data], [exchange("", "a")], "x") for n, data in enumerate(kinds.values())]
    verifier = Verifier()
    assert not any(verifier.check(sample) for sample in samples)
    assert verifier.statistics["image format"] == {"JPEG": 4, "PNG": 4, "GIF": 1, "WEBP": 1, "BMP": 1, "TIFF": 1}
    assert verifier.statistics["image orientation"] == {"upright": 11, "turned by EXIF": 1}


def test_every_bad_image_has_its_reason(photo, tmp_path):
    for reason, data in bad_images(photo).items():
        (tmp_path / "x.jpg").write_bytes(data)
        with pytest.raises(ImageError) as error:
            image = open_image(read_image(tmp_path / "x.jpg"))
            assert min(image.size) < 2  # the one that only the verifier refuses
            raise ImageError("image too small")
        assert error.value.reason == reason


def test_bombs_do_not_go_off():
    """Too many pixels are refused, a comment that would fill the memory is left packed, and its picture kept."""
    for data, reason in ((png_bomb(), "image bomb"), (text_bomb(), None), (text_bomb(after=True), None)):
        assert len(data) < 1 << 20
        tracemalloc.start()
        if reason is None:
            assert open_image(data).size == (8, 8)
        else:
            with pytest.raises(ImageError, match=reason):
                open_image(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_a_large_colour_profile_costs_no_image():
    profile = np.random.default_rng(0).bytes(3 << 20)
    data = encoded(gradient(), "png", icc_profile=profile)
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(gradient()))


FORMS = ("jpeg", "png", "webp", "tiff")


@pytest.mark.parametrize("form", FORMS)
def test_broken_exif_never_harms(form):
    """Fuzzed with a fixed seed: whatever stands in the EXIF, the picture is read, upright or as stored, by every user
    of it."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    whole = exif.tobytes()
    plain = open_image(encoded(gradient(), form))
    shown = {plain.size: np.asarray(to_rgb(plain)).astype(int)}
    shown[plain.size[::-1]] = np.asarray(to_rgb(plain).transpose(Image.Transpose.ROTATE_270)).astype(int)
    random = np.random.default_rng(0)
    cases = [b"Exif\0\0no TIFF at all", b"Exif\0\0", whole[:14], b"\xff" * 40]
    for _ in range(150):
        damaged = bytearray(whole)
        for at in random.integers(6, len(whole), random.integers(1, 5)):
            damaged[at] = random.integers(256)
        cases.append(bytes(damaged))
    turned = 0
    for number, case in enumerate(cases):
        data = encoded(gradient(), form, exif=case) if form != "tiff" else _tiff_with(whole, case)
        try:
            image = open_image(data)
        except ImageError:
            assert form == "tiff"  # whose pixels are found by these very tags
            continue
        picture = to_rgb(image)
        turned += picture.size != plain.size
        describe(image)
        shrink(data, 10, 90)
        difference = np.abs(np.asarray(picture).astype(int) - shown[picture.size])
        assert form == "tiff" or picture.size == (40, 20) or difference.mean() < 3, number
    assert form == "tiff" or turned > 20


def _tiff_with(whole, case):
    """A TIFF with some of its bytes damaged where those of `case` are: its tags are the file's own."""
    data = bytearray(encoded(gradient(), "tiff"))
    for at, (one, other) in enumerate(zip(whole, case, strict=False)):
        if one != other:
            data[-1 - at] = other
    return bytes(data)


def test_an_odd_tag_leaves_the_orientation():
    """An ImageWidth of bytes, a resolution of text: what Pillow itself cannot write back."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    odd = struct.pack("<HHIHHI", 0x011A, 2, 4, 0x6F64, 0x0064, 0)[:12]
    body = struct.pack("<2sHIH", b"II", 42, 8, 2) + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + odd + bytes(4)
    image = open_image(encoded(gradient(), "jpeg", exif=b"Exif\0\0" + body))
    assert orientation(image) == 6 and to_rgb(image).size == (20, 40)


def test_fuzzed_headers_are_images_or_defects(photo):
    """Bytes changed in the first kilobyte of every format, with a fixed seed: an image or a named defect."""
    random = np.random.default_rng(0)
    picture, defects = gradient(), set()
    for form in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jpeg2000"):
        whole = encoded(picture, form)
        for _ in range(100):
            data = bytearray(whole)
            for at in random.integers(0, min(len(data), 1000), random.integers(1, 9)):
                data[at] = random.integers(256)
            if random.random() < 0.2:
                del data[random.integers(len(data)) :]
            dropped = Verifier(max_pixels=1 << 22).check(Sample("x", [bytes(data)], [exchange("", "a")], "x"))
            if dropped is None:
                assert to_rgb(open_image(bytes(data))).mode == "RGB"
            else:
                defects.add(dropped.reason)
    assert defects <= {
        "image empty", "not an image", "image truncated", "image corrupt", "image bomb", "image animated",
        "image without a known white", "image too small",
    }  # fmt: skip
    assert len(defects) > 3


def test_transparent_pixels_show_the_background():
    """However a file says which pixels are transparent; the colour stored under them is not seen."""
    left = np.zeros((20, 40, 4), np.uint8)
    left[:, :20] = (255, 0, 0, 255)  # red, and transparent black
    rgba = Image.fromarray(left)
    palette = Image.fromarray((np.arange(40) // 20)[None].repeat(20, 0).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    keyed = Image.fromarray(np.where(left[..., 3:] > 0, left[..., :3], 7).astype(np.uint8))
    deep = Image.fromarray(np.where(left[..., 3] > 0, 0xFF00, 9000).astype(np.uint16))
    white, red = (255, 255, 255), (255, 0, 0)
    for data, seen in (
        (encoded(rgba, "png"), red),
        (encoded(rgba, "webp", lossless=True), red),
        (encoded(rgba, "tiff"), red),
        (encoded(palette, "png", transparency=1), red),
        (encoded(palette, "gif", transparency=1), red),
        (encoded(keyed, "png", transparency=(7, 7, 7)), red),
        (encoded(rgba.convert("LA"), "png"), (76, 76, 76)),
        (encoded(deep, "png", transparency=9000), (255, 255, 255)),
    ):
        image = open_image(data)
        assert describe(image)["alpha"] == "transparent"
        assert (to_rgb(image).getpixel((5, 5)), to_rgb(image).getpixel((35, 5))) == (seen, white)
        assert to_rgb(image, (1, 2, 3)).getpixel((35, 5)) == (1, 2, 3)
    assert to_rgb(open_image(encoded(rgba, "png")), None).getpixel((35, 5)) == (0, 0, 0)
    small = open_image(shrink(encoded(rgba, "png"), 10, 90))
    assert small.size == (20, 10) and to_rgb(small, (1, 2, 3)).getpixel((18, 5)) == (1, 2, 3)
    half = Image.new("RGBA", (9, 9), (0, 0, 0, 51))
    assert to_rgb(open_image(encoded(half, "png"))).getpixel((0, 0)) == (204, 204, 204)


def test_other_formats_never_reach_their_reader():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for data in (postscript, encoded(gradient(), "ico"), encoded(gradient(), "pdf")):
        with pytest.raises(ImageError, match="not an image"):
            open_image(data)


def test_images_are_stored_byte_for_byte_unless_asked(photo, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    large = encoded(gradient((120, 60)), "jpeg", exif=turned)
    samples = [Sample("small", [photo], [exchange("", "a")], "x"), Sample("large", [large], [exchange("", "a")], "x")]
    prepare(Given(samples), tmp_path / "as is")
    assert [sample.images for sample in Split(tmp_path / "as is" / "train")] == [[photo], [large]]
    manifest = prepare(Given(samples), tmp_path / "shrunk", Options(shrink=56)).manifests["train"]
    same, smaller = (sample.images[0] for sample in Split(tmp_path / "shrunk" / "train"))
    assert same is not photo and same == photo and manifest.statistics["images made smaller"] == {"shorter side 56": 1}
    image = open_image(smaller)
    assert image.size == (56, 112) and describe(image)["orientation"] == "upright"
    wanted = np.asarray(to_rgb(open_image(large)).resize((56, 112), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - wanted).mean() < 4
    assert shrink(large, 60, 90) is large


@pytest.mark.parametrize(
    "value, one, three", [(0, 0, 0), (1, 1, 1), (9, 8, 8), (15, 8, 14), (37, 32, 32), (1000, 512, 896)]
)
def test_bins(value, one, three):
    assert (int(bucket(value)), int(bucket(value, 3))) == (one, three)


def test_report_says_what_the_manifest_says(photo, part, tmp_path):
    dialogues = [exchange("What is it?", "a shape " * n) for n in (1, 5, 40)]
    items = [Sample(f"s{n}", [photo], [dialogue], "made") for n, dialogue in enumerate(dialogues)]
    items += [Dropped("no. 4", "image missing", "a|b\n<script>"), Count("not fetched", "HTTP Error 404", 7)]
    options = Options("drop", 0.5, tokenizer=str(part("smollm2-135m-instruct")), template="qa")
    manifest = prepare(Given(items), tmp_path, options).manifests["train"]
    tokens = manifest.statistics["tokens"]
    # "Question: What is it?\nAnswer:" is 9 tokens, " a shape" two each time, then a space and the end token.
    assert (tokens["all"], tokens["supervised"]) == (3 * 9 + 2 * 46 + 6, 2 * 46 + 6)
    text = report.write(tmp_path / "train").read_text()
    assert Image.open(tmp_path / "train" / report.PLOTS).size[0] > 1000
    assert "| of them copies of another | 2 (66.67%) |" in text
    assert "| left out for a defect | 1 (25.00%) |" in text
    assert f"| of them supervised | {tokens['supervised']} ({tokens['supervised'] / tokens['all']:.2%}) |" in text
    assert "| image missing | 1 | `no. 4` a\\|b &lt;script> |" in text
    assert "| not fetched | HTTP Error 404 | 7 |" in text


@pytest.mark.parametrize("name", [report.REPORT, report.PLOTS])
def test_a_report_that_is_damaged_is_no_longer_current(photo, tmp_path, name):
    prepare(Given([Sample("s", [photo], [exchange("a", "b")], "made")]), tmp_path)
    folder = tmp_path / "train"
    assert not report.is_current(folder)
    report.write(folder)
    sound = (folder / name).read_bytes()
    middle = len(sound) // 2
    for damaged in (
        b"",
        sound[:middle],
        sound[:middle] + bytes([sound[middle] ^ 4]) + sound[middle + 1 :],
        b"\xff" * 9,
    ):
        assert report.is_current(folder)
        (folder / name).write_bytes(damaged)
        assert not report.is_current(folder)
        report.write(folder)
        assert (folder / name).read_bytes() == sound
    (folder / name).unlink()
    assert not report.is_current(folder)


def test_a_template_that_cannot_render_is_a_defect(part, tmp_path):
    talk = exchange("a", "b") + exchange("c", "d")
    options = Options("drop", 0.6, tokenizer=str(part("smollm2-135m-instruct")), template="plain")
    items = [Sample("two", [], [talk], "x"), Sample("one", [], [exchange("", "b")], "x")]
    manifest = prepare(Given(items), tmp_path, options).manifests["train"]
    assert manifest.dropped == {"template cannot render it": 1}
