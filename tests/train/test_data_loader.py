"""Loader: batches, exact resume, any number of ranks and workers, evaluation passes, feature cache, image modes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BitImageProcessor, CLIPImageProcessor

from data_prep import parts
from data_prep.errors import DataError
from data_prep.schema import Sample, Split, write_split
from model.batch import IGNORE
from train.data import (
    DataConfig,
    EvalLoader,
    PixelPreprocessor,
    SourceConfig,
    TrainLoader,
    ensure_feature_cache,
    load_preprocessor,
    make_text,
)

PIXELS = PixelPreprocessor("resize", 8, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def png(seed, size=(12, 9)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def made(number, images=1, dialogues=3):
    turns = [
        [
            {"role": "user", "content": f"question {number} {d}?"},
            {"role": "assistant", "content": f"answer {number} {d}"},
        ]
        for d in range(dialogues)
    ]
    return Sample(f"s{number}", [png(100 * number + i) for i in range(images)], turns, "made")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_split(root / "a", [made(n, images=n % 3, dialogues=1 + n % 4) for n in range(40)])
    write_split(root / "b", [made(100 + n) for n in range(10)])
    write_split(root / "text", [made(200 + n, images=0) for n in range(4)])
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(parts.ensure("smollm2-135m-instruct", fetch=False))


def config(root, **changes):
    sources = [SourceConfig("a"), SourceConfig("b", 0.5)]
    defaults = {"root": str(root), "train": sources, "batch_size": 12, "dialogues_per_sample": 2, "template": "qa"}
    return DataConfig(**{**defaults, **changes})


def rows(batches):
    """Everything of micro-batches that does not depend on padding, sample by sample."""
    found = []
    for batch in batches:
        for sample in range(batch.n_samples):
            texts = [
                (
                    batch.input_ids[r][batch.attention_mask[r] == 1].tolist(),
                    batch.labels[r][batch.attention_mask[r] == 1].tolist(),
                )
                for r in (batch.row_to_sample == sample).nonzero().flatten().tolist()
            ]
            images = batch.images[(batch.image_to_sample == sample) & (batch.image_weight > 0)]
            found.append((texts, images.numpy().tobytes()))
    return found


def test_a_batch_holds_what_the_samples_hold(root, tokenizer):
    (batch,) = next(TrainLoader(config(root), tokenizer, PIXELS))
    assert batch.n_samples == 12 and batch.row_to_sample.tolist() == sorted(batch.row_to_sample.tolist())
    assert batch.images.shape == (len(batch.image_to_sample), 3, 8, 8) and batch.images.dtype == torch.float32
    lengths = batch.attention_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert batch.labels[row, length:].eq(IGNORE).all()
        # The end token, whose id is also that of padding, is a target; padding is not.
        assert batch.labels[row, length - 1] == tokenizer.eos_token_id == batch.input_ids[row, -1]
    assert lengths.max() == batch.input_ids.shape[1]
    (padded,) = next(TrainLoader(config(root, pad_to_multiple=16), tokenizer, PIXELS))
    assert padded.input_ids.shape[1] % 16 == 0 and rows([padded]) == rows([batch])


def test_batch_without_images_has_a_weightless_dummy(root, tokenizer):
    text = config(root, train=[SourceConfig("text")], batch_size=2)
    (batch,) = next(TrainLoader(text, tokenizer, PIXELS))
    assert batch.images.shape == (1, 3, 8, 8) and not batch.images.any()
    assert batch.image_weight.tolist() == [0] and not batch.has_image


def test_same_global_sequence_on_any_number_of_ranks(root, tokenizer):
    loader = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    whole = [rows(next(loader)) for _ in range(6)]  # beyond one epoch of 45 samples
    for world, accumulation in ((2, 1), (4, 3), (1, 4), (3, 2)):
        ranks = [TrainLoader(config(root), tokenizer, PIXELS, 5, rank, world, accumulation) for rank in range(world)]
        for step in range(6):
            parts = [next(rank) for rank in ranks]
            assert all(len(part) == accumulation for part in parts)
            assert [row for part in parts for row in rows(part)] == whole[step]


def test_resume_anywhere_and_on_other_ranks(root, tokenizer):
    loader = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    whole = [rows(next(loader)) for _ in range(8)]
    for stop in range(7):
        before = TrainLoader(config(root), tokenizer, PIXELS, 5, 0, 2)
        for _ in range(stop):
            next(before)
        after = [TrainLoader(config(root), tokenizer, PIXELS, 5, rank, 4) for rank in range(4)]
        for rank in after:
            rank.load(before.state())
        assert after[0].state() == before.state()
        assert [row for rank in after for row in rows(next(rank))] == whole[stop]


def test_worker_processes_change_nothing(root, tokenizer):
    plain = TrainLoader(config(root), tokenizer, PIXELS, seed=5)
    workers = TrainLoader(config(root, num_workers=2, prefetch=1), tokenizer, PIXELS, seed=5)
    workers.load({"step": 2})
    whole = [rows(next(plain)) for _ in range(5)]
    assert [rows(next(workers)) for _ in range(3)] == whole[2:]


def test_an_epoch_shows_everything(root, tokenizer):
    loader = TrainLoader(config(root, batch_size=5, dialogues_per_sample=None), tokenizer, PIXELS)
    assert loader.epoch_size == 45
    seen = [row for _ in range(9) for texts, _ in rows(next(loader)) for row, _ in texts]
    expected = sum(1 + n % 4 for n in range(40)) + 5 * 3
    assert len(seen) == expected == len({tuple(row) for row in seen})


def test_fingerprint_follows_what_decides_the_order(root, tokenizer):
    one = TrainLoader(config(root), tokenizer, PIXELS).fingerprint
    assert one == TrainLoader(config(root, num_workers=1), tokenizer, PIXELS, 0, 1, 2).fingerprint
    for change in ({"batch_size": 24}, {"dialogues_per_sample": 1}, {"train": [SourceConfig("a")]}):
        assert one != TrainLoader(config(root, **change), tokenizer, PIXELS).fingerprint


def test_bad_data_is_named_also_from_workers(tmp_path, tokenizer):
    bad = made(1)
    bad.images = [png(1)[:60]]
    write_split(tmp_path / "bad", [bad])
    for workers in (0, 1):
        loader = TrainLoader(
            config(tmp_path, train=[SourceConfig("bad")], batch_size=1, num_workers=workers), tokenizer, PIXELS
        )
        with pytest.raises(DataError, match=r"^\S+shard-00000.arrow: sample s1: image (truncated|corrupt)[^\n]*$"):
            next(loader)


def test_too_long_fails_or_is_counted(root, tokenizer):
    with pytest.raises(DataError, match=r"sample s\d+, dialogue 0: \d+ tokens, max_length=9; raise data.max_length or"):
        next(TrainLoader(config(root, max_length=9), tokenizer, PIXELS))
    loader = TrainLoader(config(root, max_length=9, on_too_long="drop"), tokenizer, PIXELS)
    (batch,) = next(loader)
    assert loader.dropped > 0 and batch.n_samples == 12
    assert batch.n_targets == 0 and batch.input_ids.shape == (1, 1)  # nothing left: one padding row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "data.train is empty"),
        ({"train": [SourceConfig("nowhere")]}, "nowhere is no prepared split"),
        ({"train": [SourceConfig("a", 0.0)]}, "must be above 0"),
        ({"batch_size": 13}, "does not divide among 2 ranks"),
        ({"template": "chatml"}, "template=chatml"),
        ({"on_too_long": "cut"}, "on_too_long=cut"),
        ({"dialogues_per_sample": 0}, "dialogues_per_sample=0"),
    ],
)
def test_bad_configuration(root, tokenizer, changes, message):
    with pytest.raises(DataError, match=message):
        TrainLoader(config(root, **changes), tokenizer, PIXELS, world_size=2)


def test_evaluation_covers_every_dialogue_once_over_ranks(root, tokenizer):
    split, text = Split(root / "a"), make_text(config(root), tokenizer)
    for world in (1, 3, 8):
        loaders = [EvalLoader(split, text, PIXELS, rows=7, rank=rank, world_size=world) for rank in range(world)]
        assert len({len(loader) for loader in loaders}) == 1
        items = []
        for loader in loaders:
            steps = list(loader)
            assert len(steps) == len(loader)
            for step in steps:
                assert not step.items or len(step.items) == len(step.batch.input_ids)
                assert step.batch.labels.eq(IGNORE).all() and step.batch.attention_mask[:, -1].all()  # left padding
                items += step.items
        assert len(items) == split.manifest.dialogues == len({(i.sample, i.dialogue) for i in items})
        assert all(i.answer == i.question.rstrip("?").replace("question", "answer") for i in items)


def test_evaluation_choices(root, tokenizer):
    split, text = Split(root / "a"), make_text(config(root), tokenizer)
    few = [i for step in EvalLoader(split, text, PIXELS, limit=20, seed=3) for i in step.items]
    assert len(few) == 20 and few == [
        i for s in EvalLoader(split, text, PIXELS, limit=20, seed=3, rows=3) for i in s.items
    ]
    blind = list(EvalLoader(split, text, PIXELS, images="none"))
    assert not any(step.batch.has_image for step in blind)
    own, shuffled = (
        [image for step in EvalLoader(split, text, PIXELS, images=kind) for _, image in rows([step.batch])]
        for kind in ("own", "shuffled")
    )
    for n in range(40):
        assert (own[n] != shuffled[n]) == bool(n % 3)  # with images: another's; text-only stays text-only
    assert sorted(own) == sorted(shuffled)
    loss = next(iter(EvalLoader(split, text, PIXELS, prompts=False))).batch
    assert loss.n_targets > 0


def test_feature_cache(root, tokenizer, tmp_path):
    splits, calls = [Split(root / "a"), Split(root / "b")], []

    def encode(pixels):
        calls.append(len(pixels))
        return pixels.flatten(2).transpose(1, 2)[:, :5]

    cache = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "float32", batch_size=7)
    assert len(cache) == sum(split.manifest.unique_images for split in splits) and cache.shape == (5, 3)
    for data in (*splits[0][2].images, *splits[1][9].images):
        assert torch.equal(cache(data), encode(PIXELS(data)[None])[0])
    every = torch.cat([cache(image) for split in splits for sample in split for image in sample.images])
    mean, std = cache.moments()
    torch.testing.assert_close(mean, every.mean(0))
    torch.testing.assert_close(std, every.std(0, correction=0))
    calls.clear()
    again = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "float32")
    assert again.folder == cache.folder and not calls
    assert ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v2", "float32").folder != cache.folder
    half = ensure_feature_cache(tmp_path, splits, PIXELS, encode, "v1", "bfloat16")
    data = splits[1][0].images[0]
    assert half(data).dtype is torch.bfloat16 and torch.equal(half(data), cache(data).bfloat16())
    with pytest.raises(DataError, match="not in the feature cache"):
        cache(png(12345))
    (batch,) = next(TrainLoader(config(root), tokenizer, half))
    assert batch.images.shape[1:] == (5, 3) and batch.images.dtype is torch.bfloat16


@pytest.mark.parametrize("size", [(40, 40), (64, 33), (31, 90), (20, 300)])
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_crop_and_resize_equal_the_hf_processors(size, kind, tmp_path):
    image = Image.open(io.BytesIO(png(1, size)))
    crop = {"height": 28, "width": 28}
    edge = {"shortest_edge": 28 if kind == "clip" else 32}
    cls = CLIPImageProcessor if kind == "clip" else BitImageProcessor
    processor = cls(size=edge, crop_size=crop, resample=3, image_mean=[0.48, 0.45, 0.4], image_std=[0.26, 0.27, 0.28])
    processor.save_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    got = load_preprocessor(tmp_path, "crop")(png(1, size))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    square = processor(image, size={"height": 28, "width": 28}, do_center_crop=False, return_tensors="pt")
    got = load_preprocessor(tmp_path, "resize")(png(1, size))
    torch.testing.assert_close(got, square["pixel_values"][0], atol=1e-5, rtol=0)


def test_pad_puts_the_image_in_the_middle_of_the_mean_colour():
    stream = io.BytesIO()
    Image.new("RGB", (32, 16), (255, 0, 0)).save(stream, "png")
    pixels = PixelPreprocessor("pad", 32, 32, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))(stream.getvalue())
    red = torch.tensor([0.5, -0.5, -0.5])
    assert torch.allclose(pixels[:, 10:22].mean((1, 2)), red, atol=1e-6)
    assert pixels[:, :7].abs().max() < 0.01 and pixels[:, 25:].abs().max() < 0.01


def test_unknown_image_mode_and_missing_settings(tmp_path):
    with pytest.raises(DataError, match="image_mode=stretch.*resize, crop, pad"):
        load_preprocessor(tmp_path, "stretch")
    with pytest.raises(DataError, match="preprocessor_config.json is missing"):
        load_preprocessor(tmp_path, "crop")
