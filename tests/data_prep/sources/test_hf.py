"""Hugging Face data sets on disk: saved ones and files; images as features, bytes and paths; captions and turns."""

import base64

import datasets
import pytest

from data_prep.prepare import Options, prepare
from data_prep.report import to_look_at
from data_prep.sources.hf import HuggingFace
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from tests.data_prep.miniature import bad_images, pictures


@pytest.fixture(scope="module")
def photos(part):
    return pictures(part("easy_vqa"), 30)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(split):
    return [[turn["content"] for turn in sample.conversations[0]] for sample in split]


def test_saved_to_disk_with_image_feature(photos, tmp_path):
    features = datasets.Features(
        {"picture": datasets.Image(), "alt": datasets.Value("string"), "n": datasets.Value("int32")}
    )
    rows = {
        "picture": [{"bytes": p, "path": None} for p in photos],
        "alt": [f"no. {n}" for n in range(30)],
        "n": list(range(30)),
    }
    dataset = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"validation": dataset}).save_to_disk(tmp_path / "in")
    source = HuggingFace(tmp_path / "in", "validation", "picture", "alt", samples_per_shard=8)
    manifest = prepare(source, tmp_path / "out").manifests["validation"]
    split = Split(tmp_path / "out" / "validation")
    assert len(manifest.shards) == 4 and [sample.images for sample in split] == [[photo] for photo in photos]
    assert texts(split) == [["", f"no. {n}"] for n in range(30)]


def test_parquet_with_several_images_and_turns(photos, tmp_path):
    lists = datasets.List(datasets.Image())
    talk = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    turned = [
        {"role": role, "content": text} for role, text in (("user", "<image><image>\nSame?"), ("assistant", "no"))
    ]
    rows = {
        "images": [[{"bytes": p, "path": None} for p in photos[:2]], [], [{"bytes": photos[0], "path": None}]],
        "talk": [turned, [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], turned],
    }
    dataset = datasets.Dataset.from_dict(rows, datasets.Features({"images": lists, "talk": talk}))
    (tmp_path / "in").mkdir()
    dataset.to_parquet(tmp_path / "in" / "train-00000-of-00001.parquet")
    source = HuggingFace(tmp_path / "in", image="images", text="talk")
    manifest = prepare(source, tmp_path / "out", Options("drop", 0.5)).manifests["train"]
    assert manifest.dropped == {"image tokens differ from images": 1} and manifest.text_only == 1
    split = Split(tmp_path / "out" / "train")
    assert split[0].images == photos[:2] and texts(split) == [["<image><image>Same?", "no"], ["1+1?", "2"]]


def test_json_lines_with_paths_questions_and_defects(photos, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    bad = bad_images(photos[0])
    for name, data in {"a b.jpg": photos[1], **{f"{reason}.jpg": data for reason, data in bad.items()}}.items():
        (folder / name).write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(photos[2])
    names = ["a b.jpg", "../secret.jpg", "gone.jpg", str(tmp_path / "secret.jpg"), *(f"{reason}.jpg" for reason in bad)]
    rows = {"image": names, "q": ["what?"] * len(names), "a": ["that"] * len(names)}
    datasets.Dataset.from_dict(rows).to_json(folder / "train.jsonl")
    source = HuggingFace(folder, image="image", text="a", question="q")
    manifest = prepare(source, tmp_path / "out", Options("drop", 1.0)).manifests["train"]
    assert manifest.dropped == {**dict.fromkeys(bad, 1), "image path leaves its folder": 2, "image missing": 1}
    assert texts(Split(tmp_path / "out" / "train")) == [["what?", "that"]]
    assert Split(tmp_path / "out" / "train")[0].images == [photos[1]]


def test_folder_of_images_with_metadata(photos, tmp_path):
    (tmp_path / "in").mkdir()
    lines = ["file_name,text"]
    for number, photo in enumerate(photos[:5]):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(photo)
        lines.append(f"{number}.jpg,number {number}")
    (tmp_path / "in" / "metadata.csv").write_text("\n".join(lines) + "\n")
    prepare(HuggingFace(tmp_path / "in"), tmp_path / "out")
    split = Split(tmp_path / "out" / "train")
    assert [s.images for s in split] == [[p] for p in photos[:5]] and texts(split)[3] == ["", "number 3"]


def test_common_shapes_are_known_by_their_names(photos, tmp_path):
    """Classes, several answers, votes, choices, exchanges, base64, numbers: as tables of the hub have them."""
    encoded = base64.b64encode(photos[0]).decode()
    votes = [{"answer": answer, "answer_id": n} for n, answer in enumerate(["red"] * 6 + ["dark red"] * 4)]
    exchanges = [{"user": "What?", "assistant": "a dog", "source": "x"}, {"user": "Where?", "assistant": "here"}]
    pair = [{"from": "human", "value": "Hi", "role": None, "content": None}, {"from": None, "role": "assistant",
            "value": None, "content": "Hello"}]  # fmt: skip
    choice = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1}
    for number, (row, texts_wanted, reference) in enumerate([
        ({"caption": "a dog"}, [["", "a dog"]], None),
        ({"captions": ["a dog", "an animal"]}, [["", "a dog"], ["", "an animal"]], None),
        ({"texts": exchanges}, [["What?", "a dog"], ["Where?", "here"]], None),
        ({"messages": pair}, [["Hi", "Hello"]], None),
        ({"question": "How many?", "answer": 3}, [["How many?", "3"]], ([], "exact", "")),
        ({"question": "Colour?", "answers": votes, "answer_type": "other"}, [["Colour?", "red"]],
         (["red"] * 6 + ["dark red"] * 4, "vqa", "other")),
        ({"question": "Title?", "answers": ["The End", "End"]}, [["Title?", "The End"]],
         (["The End", "End"], "exact", "")),
        (choice, [["Which?\nA. cat\nB. dog", "B"]], (["B", "dog"], "choice", "")),
    ]):  # fmt: skip
        folder = tmp_path / f"in{number}"
        datasets.Dataset.from_list([{"image": encoded, **row}]).save_to_disk(folder)
        prepare(HuggingFace(folder), tmp_path / f"out{number}")
        (sample,) = Split(tmp_path / f"out{number}" / "train")
        assert sample.images == [photos[0]]
        assert [[turn["content"] for turn in dialogue] for dialogue in sample.conversations] == texts_wanted
        found = [(each["answers"], each["match"], each["kind"]) for each in sample.references]
        assert found == ([] if reference is None else [reference])


def test_captions_beside_questions_are_left_out_and_it_says_how_to_get_them(photos, tmp_path):
    rows = [{"image": photos[n], "question": "What?", "answer": "a dog", "caption": f"A dog {n}."} for n in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "in")
    manifest = prepare(HuggingFace(tmp_path / "in"), tmp_path / "dogs").manifests["train"]
    assert texts(Split(tmp_path / "dogs" / "train"))[0] == ["What?", "a dog"]
    (note,) = to_look_at(manifest)
    assert "column caption was left out" in note and "name=dogs_captions source.text=caption" in note
    manifest = prepare(HuggingFace(tmp_path / "in", text="caption"), tmp_path / "dogs_captions").manifests["train"]
    assert texts(Split(tmp_path / "dogs_captions" / "train"))[2] == ["", "A dog 2."] and not to_look_at(manifest)


def test_classes_are_named_and_null_images_are_defects(photos, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["tabby_cat", "dog"])})
    rows = {"image": [{"bytes": photos[0], "path": None}, None], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "in")
    manifest = prepare(HuggingFace(tmp_path / "in"), tmp_path / "out", Options("drop", 0.6)).manifests["train"]
    assert texts(Split(tmp_path / "out" / "train")) == [["", "tabby cat"]]
    assert manifest.dropped == {"image missing": 1} and manifest.text_only == 0
    prepare(HuggingFace(tmp_path / "in", image=""), tmp_path / "text")
    assert texts(Split(tmp_path / "text" / "train")) == [["", "tabby cat"], ["", "dog"]]


def test_errors(photos, tmp_path):
    with pytest.raises(DataError, match="no such folder; nothing is downloaded"):
        prepare(HuggingFace(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="cannot load split train"):
        prepare(HuggingFace(tmp_path / "in"), tmp_path / "out")
    datasets.Dataset.from_dict({"image": [b"x"], "said": ["a"]}).to_parquet(tmp_path / "in" / "train.parquet")
    with pytest.raises(DataError, match="no column known as caption; columns are image, said, known are conversations"):
        prepare(HuggingFace(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(DataError, match=r"no column text \(source.text\); columns are image, said"):
        prepare(HuggingFace(tmp_path / "in", text="text"), tmp_path / "out")
    (tmp_path / "in" / "x.tar").touch()
    with pytest.raises(DataError, match="use source=webdataset"):
        prepare(HuggingFace(tmp_path / "in"), tmp_path / "out")
