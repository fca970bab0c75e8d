"""Your own pictures in every shape that is known, to splits that training finds by the data set's name."""

import json

import pytest
from PIL import Image

from common.errors import ConfigError
from data_prep import config as preparation
from data_prep.prepare import Options, prepare
from data_prep.sources import folder
from data_prep.sources.folder import Folder
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from tests.data_prep.miniature import encoded
from train.data.config import DataConfig, SourceConfig


def picture(number):
    return encoded(Image.new("RGB", (9, 9), (number % 256, number // 256, 7)), "png")


def fill(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def read(folder, split):
    return [
        [turn["content"] for dialogue in sample.conversations for turn in dialogue] for sample in Split(folder / split)
    ]


def test_class_folders_become_five_splits(tmp_path):
    names = [f"{label}/{number}.png" for label in ("tabby_cat", "dog") for number in range(50)]
    fill(tmp_path / "in", names)
    (tmp_path / "in" / "dog" / "copy.png").write_bytes(picture(50))  # of dog/0: on the same side as that
    manifests = prepare(Folder(tmp_path / "in"), tmp_path / "out").manifests
    sizes = {name: manifest.samples for name, manifest in manifests.items()}
    assert sizes["train"] == sizes["caption_train"] and sizes["val"] == sizes["caption_val"]
    assert sum(sizes[name] for name in ("train", "val", "test")) == 101 and list(sizes).count("caption_test") == 0
    assert 10 <= sizes["test"] <= 11 and 10 <= sizes["val"] <= 11
    for split in ("val", "test"):  # each class gives its share
        answers = [texts[1] for texts in read(tmp_path / "out", split)]
        assert 4 <= answers.count("dog") <= 6 and 4 <= answers.count("tabby cat") <= 6
    images = {split: {s.images[0] for s in Split(tmp_path / "out" / split)} for split in ("train", "val", "test")}
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert read(tmp_path / "out", "caption_train")[0] == ["The picture shows", "dog"]
    assert ["What is in the picture?", "tabby cat"] in read(tmp_path / "out", "train")


def test_names_of_files_and_folders_of_splits(tmp_path):
    fill(
        tmp_path / "in",
        ["train/red_circle-01.png", "train/red_circle-02.png", "validation/blue cup (3).jpg", "test/7.png"],
    )
    prepare(Folder(tmp_path / "in"), tmp_path / "out")
    shown = {split: read(tmp_path / "out", split) for split in ("caption_train", "caption_val", "test")}
    assert shown == {
        "caption_train": [["The picture shows", "red circle"]] * 2, "caption_val": [["The picture shows", "blue cup"]],
        "test": [["What is in the picture?", "7"]],
    }  # fmt: skip


@pytest.mark.parametrize("form", ["csv", "semicolon", "tsv", "jsonl", "json"])
def test_tables_of_questions(tmp_path, form):
    """Several rows of an image are one sample; several answers, kinds and a byte order mark are read."""
    fill(tmp_path / "in", [f"p/{n}.png" for n in range(20)])
    rows = [
        {"image": f"p/{n}.png", "question": question, "answer": answer, "kind": kind}
        for n in range(20)
        for question, answer, kind in (("How many?", '["3", "three"]', "count"), ("What, then?", "a cup", "what"))
    ]
    if form in ("jsonl", "json"):
        for row in rows:
            row["answer"] = json.loads(row["answer"]) if row["answer"].startswith("[") else row["answer"]
        text = json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows))
    else:
        mark = {"csv": ",", "semicolon": ";", "tsv": "\t"}[form]
        cells = [rows[0].keys(), *(row.values() for row in rows)]
        text = "\r\n".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)
    suffix = "csv" if form == "semicolon" else form
    (tmp_path / "in" / f"questions.{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare(Folder(tmp_path / "in"), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_dir()} == {"train", "val", "test"}
    sample = Split(tmp_path / "out" / "train")[0]
    assert [[turn["content"] for turn in talk] for talk in sample.conversations] == [
        ["How many?", "3"], ["What, then?", "a cup"],
    ]  # fmt: skip
    assert [(each["kind"], each["answers"]) for each in sample.references] == [("count", ["3", "three"]), ("what", [])]
    assert sum(len(Split(tmp_path / "out" / split)) for split in ("train", "val", "test")) == 20


def test_a_table_of_questions_and_captions_gives_both(tmp_path):
    """Captions to pretraining's splits, each once however many questions repeat it; questions to the others."""
    fill(tmp_path / "in", [f"{n}.png" for n in range(40)])
    rows = [f"{n}.png,{q}?,{q} of {n},{f'a cup {n}' if n % 4 else ''}" for n in range(40) for q in ("what", "who")]
    (tmp_path / "in" / "questions.csv").write_text("\n".join(["image,question,answer,caption", *rows]))
    prepare(Folder(tmp_path / "in"), tmp_path / "out")
    kept = {split: read(tmp_path / "out", split) for split in ("train", "caption_train", "val", "caption_val", "test")}
    numbers = {split: {texts[1].rsplit(" ", 1)[1] for texts in found} for split, found in kept.items()}
    for split in ("train", "val"):
        assert numbers[f"caption_{split}"] == {n for n in numbers[split] if int(n) % 4}
        assert all(texts[0] == "The picture shows" and len(texts) == 2 for texts in kept[f"caption_{split}"])
    assert all(texts[::2] == ["what?", "who?"] for split in ("train", "val", "test") for texts in kept[split])
    assert sum(len(kept[split]) for split in ("train", "val", "test")) == 40


def test_image_folder_of_datasets_and_a_column_of_splits(tmp_path):
    fill(tmp_path / "in", [f"{n}.png" for n in range(6)])
    lines = ["file_name,text,split", *(f'{n}.png,"number {n}, here",{"test" if n > 3 else "train"}' for n in range(6))]
    (tmp_path / "in" / "metadata.csv").write_text("\n".join(lines))
    prepare(Folder(tmp_path / "in", val_fraction=0.25, opening=""), tmp_path / "out")
    assert [len(Split(tmp_path / "out" / split)) for split in ("train", "val", "test")] == [3, 1, 2]
    assert read(tmp_path / "out", "caption_val")[0][0] == ""
    assert read(tmp_path / "out", "test") == [["What is in the picture?", f"number {n}, here"] for n in (4, 5)]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder or table"):
        prepare(Folder(tmp_path / "none"), tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").touch()
    with pytest.raises(DataError, match="holds no image .*but 1 files of .mp4"):
        prepare(Folder(tmp_path / "in"), tmp_path / "out")
    table = tmp_path / "in" / "x.csv"
    for text, message in {
        "image,q\na.png,b\n": "no column known as caption; columns are image, q",
        "image,text\n": "holds no row",
        "image,text\na.png,b,c\n": "row 1 has more cells than the head",
        "image,text\n,b\n": "row 1 names no image in column image",
    }.items():
        table.write_text(text)
        folder._listing.cache_clear()
        with pytest.raises(DataError, match=message):
            prepare(Folder(tmp_path / "in"), tmp_path / "out")
    table.write_bytes("image,text\na.png,\xe9t\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        prepare(Folder(tmp_path / "in"), tmp_path / "out")
    table.write_text("image,text\n../secret.png,b\ngone.png,c\n/etc/passwd,d\n")
    (tmp_path / "secret.png").write_bytes(picture(0))
    source = Folder(tmp_path / "in", val_fraction=0, test_fraction=0)
    folder._listing.cache_clear()
    manifest = prepare(source, tmp_path / "out", Options("drop", 1.0)).manifests["train"]
    assert manifest.dropped == {"image path leaves its folder": 2, "image missing": 1}
    with pytest.raises(DataError, match="2 different images are too few to divide by test_fraction=0.1"):
        fill(tmp_path / "few", ["a/1.png", "b/2.png"])
        prepare(Folder(tmp_path / "few"), tmp_path / "few_out")


def test_training_finds_the_splits_by_name(tmp_path):
    fill(tmp_path / "in", [f"{label}/{n}.png" for label in "ab" for n in range(20)])
    settings = preparation.load(
        ["source=folder", f"source.path={tmp_path}/in", "name=mine", f"root={tmp_path}/data", "val_fraction=0.2"]
    )
    assert settings.build_source().val_fraction == 0.2
    prepare(settings.build_source(), tmp_path / "data" / "mine")
    for stage, first in (("pretrain", "caption_"), ("finetune", "")):
        data = DataConfig(root=str(tmp_path / "data"), name="mine")
        data.use_named(stage)
        assert data.train == [SourceConfig(f"mine/{first}train")] and data.name is None
        assert (data.val, data.test) == (f"mine/{first}val", "mine/test")
    with pytest.raises(ConfigError, match=r"data.name=yours: no data set .*there are mine.*source=folder"):
        DataConfig(root=str(tmp_path / "data"), name="yours").use_named("pretrain")
