"""Image modes, against the Hugging Face processors and LLaVA's definition of padding."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, Dinov2Config, LlavaNextImageProcessor

from common.errors import ConfigError
from data_prep.store import pixels as pixels_module
from data_prep.store.errors import DataError
from data_prep.store.pixels import MAX_CANVAS, PixelPreprocessor, grids, load_preprocessor
from model.config import VisionConfig

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(image, form="png", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def vision(path, mode, **options):
    return VisionConfig(path=str(path), image_mode=mode, **options)


@pytest.mark.parametrize(
    "size", [(40, 40), (64, 33), (31, 90), (20, 300), (28, 28), (64, 48), (48, 64), (75, 50), (7, 3)]
)
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_crop_and_resize_equal_the_hf_processors(size, kind, tmp_path):
    image = picture(size)
    crop = {"height": 28, "width": 28}
    edge = {"shortest_edge": 28 if kind == "clip" else 32}
    cls = CLIPImageProcessor if kind == "clip" else BitImageProcessor
    processor = cls(size=edge, crop_size=crop, resample=3, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    got = load_preprocessor(vision(tmp_path, "crop"))(encoded(image))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    square = processor(image, size={"height": 28, "width": 28}, do_center_crop=False, return_tensors="pt")
    got = load_preprocessor(vision(tmp_path, "resize"))(encoded(image))
    torch.testing.assert_close(got, square["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (640, 480), (640, 427), (333, 500), (1024, 683), (337, 336), (1600, 90)]
)
def test_crop_equals_clip_at_photograph_sizes(size, tmp_path):
    """Where only the cut is scaled (4:3) and where that would move it."""
    image = picture(size)
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor.save_pretrained(tmp_path)
    got = load_preprocessor(vision(tmp_path, "crop"))(encoded(image, "bmp"))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 40), (10, 20), (100, 30), (30, 100), (64, 57), (200, 150), (28, 56), (3, 50)])
@pytest.mark.parametrize("max_tiles", [2, 4, 9])
def test_tiles_equal_llava_next(size, max_tiles, tmp_path):
    image = picture(size)
    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**settings, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    pinpoints = [[28 * rows, 28 * columns] for columns, rows in grids(max_tiles)]
    processor = LlavaNextImageProcessor(**settings, image_mean=MEAN, image_std=STD, image_grid_pinpoints=pinpoints)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    got = load_preprocessor(vision(tmp_path, "tiles", max_tiles=max_tiles))(encoded(image))
    assert 3 <= len(got) <= 1 + max_tiles
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_grids():
    assert grids(2) == [(1, 2), (2, 1)]
    assert grids(4) == [(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
    assert len(grids(9)) == sum(9 // columns for columns in range(1, 10)) - 1


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (31, 20), (20, 31), (24, 24), (640, 427), (90, 7), (300, 299)])
def test_pad_is_llavas_square_in_the_mean_colour(size, tmp_path):
    image = picture(size)
    CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD
    ).save_pretrained(tmp_path)
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(m * 255) for m in MEAN]
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(image)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    expected = processor(Image.fromarray(square), return_tensors="pt")["pixel_values"]
    got = load_preprocessor(vision(tmp_path, "pad"))(encoded(image))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["crop", "pad", "tiles"])
def test_every_kind_of_file_gives_the_picture_a_viewer_shows(mode):
    make = PixelPreprocessor(mode, 16, 16, MEAN, STD)
    image = picture((24, 16))
    expected = make(encoded(image))
    turned = image.transpose(Image.Transpose.ROTATE_90)  # 6: to be shown turned by 90 degrees clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    assert torch.equal(make(encoded(turned, exif=exif)), expected)
    alpha = image.copy()
    alpha.putalpha(Image.new("L", image.size, 0))
    assert torch.equal(make(encoded(alpha)), make(encoded(Image.new("RGB", image.size, "white"))))
    mean = Image.new("RGB", image.size, tuple(int(value * 255) for value in MEAN))
    assert torch.equal(replace(make, transparent="mean")(encoded(alpha)), make(encoded(mean)))
    assert torch.equal(replace(make, transparent="drop")(encoded(alpha)), expected)  # as the HF processors
    few = image.quantize(16)
    assert torch.equal(make(encoded(few)), make(encoded(few.convert("RGB"))))
    grey = image.convert("L")
    assert torch.equal(make(encoded(grey)), make(encoded(Image.merge("RGB", [grey] * 3))))
    inks = image.convert("CMYK")
    assert torch.equal(make(encoded(inks, "tiff")), make(encoded(inks.convert("RGB"))))


@pytest.mark.parametrize("mode", ["resize", "crop", "pad", "tiles"])
@pytest.mark.parametrize("size", [(2, 40_000), (40_000, 2), (3, 1_000_000)])
def test_thin_strips_are_bounded(mode, size, monkeypatch):
    """A file of some hundred bytes makes no picture above a few megapixels on its way."""
    made = []
    for name in ("resize", "crop"):
        original = getattr(Image.Image, name)

        def watched(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            made.append(out.width * out.height)
            return out

        monkeypatch.setattr(Image.Image, name, watched)
    plain = Image.new
    monkeypatch.setattr(
        Image, "new", lambda kind, size, *more: made.append(size[0] * size[1]) or plain(kind, size, *more)
    )
    views = PixelPreprocessor(mode, 28, 32, MEAN, STD).views(plain("RGB", size, (9, 99, 199)))
    assert {view.size for view in views} == {(28, 28)} and max(made) <= MAX_CANVAS
    assert any((9, 99, 199) in {view.getpixel((x, y)) for x in (13, 14) for y in (13, 14)} for view in views)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(20, 200), (200, 20), (31, 90), (300, 120)])
def test_the_way_of_strips_only_rounds_differently(mode, size, monkeypatch):
    image = picture((4, 4)).resize(size, Image.Resampling.BICUBIC)
    make = PixelPreprocessor(mode, 28, 28, MEAN, STD)
    usual = np.asarray(make.views(image)[0]).astype(int)
    monkeypatch.setattr(pixels_module, "MAX_CANVAS", 1)
    difference = np.abs(np.asarray(make.views(image)[0]).astype(int) - usual)
    # With `pad` the edge of the picture falls between two pixels, which only the usual way shows.
    assert np.median(difference) <= 1 and (difference > 8).mean() < (0.15 if mode == "pad" else 0.01)


def test_fingerprint_follows_what_the_mode_reads():
    def of(mode, **changes):
        return PixelPreprocessor(**{"mode": mode, "size": 8, "shortest_edge": 8, "mean": MEAN, "std": STD, **changes})

    assert of("crop").fingerprint == of("crop", max_tiles=9).fingerprint != of("pad").fingerprint
    assert of("tiles").fingerprint != of("tiles", max_tiles=9).fingerprint


def test_unknown_image_mode_and_missing_settings(tmp_path):
    with pytest.raises(ConfigError, match="image_mode=stretch.*crop, resize, pad, tiles"):
        load_preprocessor(vision(tmp_path, "stretch"))
    with pytest.raises(ConfigError, match="max_tiles=1: must be at least 2"):
        load_preprocessor(vision(tmp_path, "tiles", max_tiles=1))
    with pytest.raises(DataError, match="preprocessor_config.json is missing"):
        load_preprocessor(vision(tmp_path, "crop"))


def test_an_encoder_trained_at_another_size_than_its_processor_crops_to(tmp_path):
    """DINOv2: pixels have the size that the encoder's positions are for, as `VisionEncoder` takes it."""
    processor = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load_preprocessor(VisionConfig(path=str(tmp_path))).size == 28
    Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    ).save_pretrained(tmp_path)
    assert load_preprocessor(VisionConfig(path=str(tmp_path))).size == 56
    assert load_preprocessor(VisionConfig(path=str(tmp_path), image_size=28)).size == 28
