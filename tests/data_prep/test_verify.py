"""Images of every kind, hostile ones, the report, and re-encoding on request."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data_prep import report
from data_prep.prepare import Options, prepare
from data_prep.store.images import ImageError, describe, open_image, read_image, shrink, to_rgb
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
        ("PNG", "P", "upright", "yes"): encoded(gradient().quantize(), "png", transparency=0),
        ("PNG", "RGBA", "upright", "yes"): encoded(gradient().convert("RGBA"), "png"),
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


@pytest.mark.parametrize("bomb", [png_bomb, text_bomb])
def test_bombs_are_refused_before_they_go_off(bomb):
    data = bomb()
    assert len(data) < 1 << 20
    tracemalloc.start()
    with pytest.raises(ImageError, match="image bomb|image corrupt: Decompressed data too large"):
        open_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


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


def test_a_template_that_cannot_render_is_a_defect(part, tmp_path):
    talk = exchange("a", "b") + exchange("c", "d")
    options = Options("drop", 0.6, tokenizer=str(part("smollm2-135m-instruct")), template="plain")
    items = [Sample("two", [], [talk], "x"), Sample("one", [], [exchange("", "b")], "x")]
    manifest = prepare(Given(items), tmp_path, options).manifests["train"]
    assert manifest.dropped == {"template cannot render it": 1}
