"""Miniatures of LLaVA-Pretrain and the LLaVA-1.5 mix: names, layout, turns and defects of the real ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.prepare import Options, Task, prepare
from data_prep.sources import json_stream
from data_prep.sources.llava import Llava
from data_prep.store.errors import DataError, Defect
from data_prep.store.split import Split
from data_prep.text.dialogues import from_text_or_turns
from data_prep.verify import check_dialogue
from tests.data_prep.miniature import bad_images, encoded, pictures, turns, write_json

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
PROMPT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def photos(part):
    return pictures(part("easy_vqa"), 300)


@pytest.fixture(scope="module")
def mix(photos, tmp_path_factory):
    """A sound miniature: its folder, and what must come out as {id: (images, dialogue, source)} in order."""
    folder = tmp_path_factory.mktemp("mix")
    records, expected = [], {}
    for number in range(1980):
        where = FOLDERS[number % len(FOLDERS)]
        name, data = f"{where}/{number % 300:012d}.jpg", photos[number % 300]
        texts = [
            f"<image>\nWhat is it?{PROMPT}",
            "circle",
            f"Which colour?{PROMPT}",
            "teal ünï 東京",
            "USER: sure?",
            "yes",
        ]
        if number % 3 == 1:
            texts = ["Where is it?\n<image>", "there"]
        if number % 9 == 0:  # ShareGPT
            record = {
                "id": f"share{number // 18}",
                "model": "",
                "conversations": turns("Hi  there \n", "Hello", "1+1?", "2"),
            }
            images, plain, source = [], ["Hi  there \n", "Hello", "1+1?", "2"], "text"
        else:
            record = {"id": f"{number % 300:012d}", "image": name, "conversations": turns(*texts)}
            images, source = [data], where.split("/")[0]
            plain = [text.replace("<image>", "").strip() if "<image>" in text else text for text in texts]
            file = folder / name
            if where == "ocr_vqa/images" and number % 5 == 0:  # saved under the suffix of its URL
                kind = ("png", "gif")[number // 30 % 2]
                file = file.with_suffix("." + kind)
                images = [encoded(Image.new("RGB", (20, 30), (number % 256, 9, 9)), kind)]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(images[0])
            images = [file.read_bytes()]
        records.append(record)
        dialogue = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(plain)]
        expected[f"{record['id']}@{number}"] = (images, dialogue, source)
    write_json(folder / "llava_v1_5_mix665k.json", records)
    return folder, records, expected


def check_all_there(split, expected):
    assert [sample.id for sample in split] == list(expected)
    for sample in split:
        assert (sample.images, sample.conversations[0], sample.source) == expected[sample.id]
        assert len(sample.conversations) == 1


def test_nothing_sound_is_dropped(mix, tmp_path):
    folder, _, expected = mix
    source = Llava(folder / "llava_v1_5_mix665k.json", folder, samples_per_shard=500)
    manifest = prepare(source, tmp_path / "mix").manifests["train"]
    assert not manifest.dropped and len(manifest.shards) == 4
    check_all_there(Split(tmp_path / "mix" / "train"), expected)
    texts = sum(not images for images, _, _ in expected.values())
    assert manifest.text_only == texts == manifest.sources["text"]
    assert set(manifest.sources) == {"coco", "gqa", "ocr_vqa", "textvqa", "vg", "text"}
    found = manifest.statistics["image found under another suffix"]
    renamed = {"ocr_vqa: .png", "ocr_vqa: .gif"}
    assert set(found) == renamed and sum(found.values()) == sum(
        bool(images) and images[0][:3] in (b"GIF", b"\x89PN") for images, _, _ in expected.values()
    )
    assert sum(manifest.statistics["image tokens taken out"].values()) == 1980 - texts


def test_several_images_stand_where_the_source_says(photos, tmp_path):
    (tmp_path / "a").mkdir()
    for number, photo in enumerate(photos[:2]):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(photo)
    both = ["a/0.jpg", "a/1.jpg"]
    records = [
        (both, ["<image>\n<image>\nSame?", "no"], ["<image><image>Same?", "no"]),
        (both, ["Is <image> like <image>?", "no"], ["Is <image> like <image>?", "no"]),
        (both, ["<image>\nWhat?", "a", "And <image>\n", "b"], ["<image>What?", "a", "And <image>", "b"]),
        (both[:1], ["Say hello.", "Hello", "<image>\nWhat?", "a"], ["Say hello.", "Hello", "<image>What?", "a"]),
        (both[:1], ["What is it?\n<image>", "a"], ["What is it?", "a"]),
    ]
    told = [{"id": n, "image": images, "conversations": turns(*said)} for n, (images, said, _) in enumerate(records)]
    (tmp_path / "mix.json").write_text(json.dumps(told))
    manifest = prepare(Llava(tmp_path / "mix.json", tmp_path), tmp_path / "out").manifests["train"]
    found = [[turn["content"] for turn in sample.conversations[0]] for sample in Split(tmp_path / "out" / "train")]
    assert found == [kept for _, _, kept in records]
    assert manifest.statistics["image tokens taken out"] == {"a": 1}


def plant(mix, photos, folder):
    """A copy of the mix with one defect of every kind; returns the records and {reason: id}."""
    source, records, _ = mix
    for where in FOLDERS:
        (folder / where).parent.mkdir(parents=True, exist_ok=True)
        (folder / where).symlink_to(source / where)  # a big data set is often linked into place
    (folder / "planted").mkdir()
    question, image = "<image>\nWhat is it?", "coco/train2017/000000000006.jpg"

    def record(*texts, image=image, **more):
        return {"id": "bad", **({"image": image} if image else {}), "conversations": turns(*texts), **more}

    planted = {
        "image missing": record(question, "a", image="ocr_vqa/images/1565925389.jpg"),
        "image path leaves its folder": record(question, "a", image="../../../etc/passwd"),
        "image path is no file name": record(question, "a", image=7),
        "image file unreadable": None,
        "image tokens differ from images": record("<image><image>\nWhat?", "a"),
        "image token in an answer": record(question, "an <image>"),
        "conversation is no list": record(conversations="What? a"),
        "conversation empty": record(conversations=[], image=None),
        "turn is no object": record(conversations=["What?", "a"]),
        "turn without text": record(question, None),
        "unknown role": record(conversations=[{"from": "human", "value": question}, {"from": "bing", "value": "a"}]),
        "roles do not alternate": record(conversations=turns(question) + turns("And?", "a")),
        "no final answer": record(question, "a", "And?"),
        "answer empty": record(question, " \n"),
        "text holds a NUL character": record(question, "a\0b"),
        "text is not valid Unicode": record(question, "a \ud800"),
        "id is not valid Unicode": record(question, "a", id="\udfff"),
        "too long": record(question, "word " * 400),
    }
    del planted["image file unreadable"]  # root reads everything
    for reason, data in bad_images(photos[0]).items():
        name = f"planted/{reason.replace(' ', '_')}.jpg"
        (folder / name).write_bytes(data)
        planted[reason] = record(question, "a", image=name)
    mixed = [*((None, sound) for sound in records), *planted.items()]
    random.Random(0).shuffle(mixed)
    ids = {reason: f"{bad['id']}@{number}" for number, (reason, bad) in enumerate(mixed) if reason}
    write_json(folder / "mix.json", [each for _, each in mixed])
    return mixed, ids


def test_every_planted_defect_is_found_and_named(mix, photos, part, tmp_path):
    mixed, ids = plant(mix, photos, tmp_path)
    assert len(ids) >= 20 and 0.01 < len(ids) / len(mixed) < 0.013
    source = Llava(tmp_path / "mix.json", tmp_path, samples_per_shard=300)
    tokenizer = str(part("smollm2-135m-instruct"))
    options = Options(
        on_error="drop", max_drop_fraction=0.02, tokenizer=tokenizer, template="vicuna_v1", max_length=300
    )
    manifest = prepare(source, tmp_path / "out", options).manifests["train"]
    assert manifest.dropped == dict.fromkeys(sorted(ids), 1)
    assert {example["reason"]: example["id"] for example in manifest.dropped_examples} == ids
    kept = [f"{record['id']}@{number}" for number, (reason, record) in enumerate(mixed) if not reason]
    assert [sample.id for sample in Split(tmp_path / "out" / "train")] == kept
    assert sum(manifest.statistics["dialogue tokens"].values()) == len(kept)
    # The first of them ends a run that tolerates nothing.
    first = min(ids.values(), key=lambda name: int(name.rsplit("@", 1)[1]))
    with pytest.raises(DataError, match=f"out2/train: sample {first}: .*on_error=drop"):
        prepare(source, tmp_path / "out2", Options(tokenizer=tokenizer, template="vicuna_v1", max_length=300))


def test_captions_of_llava_pretrain(photos, tmp_path):
    records = []
    for number, data in enumerate(photos[:50]):
        name = f"{number % 7:05d}/{number:09d}.jpg"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
        asked = (
            "Write a terse but informative summary of the picture.\n<image>",
            "<image>\nShare a concise description",
        )
        records.append(
            {"id": f"{number:09d}", "image": name, "conversations": turns(asked[number % 2], f"a shape {number}")}
        )
    write_json(tmp_path / "blip_laion_cc_sbu_558k.json", records)
    source = Llava(tmp_path / "blip_laion_cc_sbu_558k.json", tmp_path / "images", captions=True, label="llava_pretrain")
    manifest = prepare(source, tmp_path / "out").manifests["train"]
    assert manifest.sources == {"llava_pretrain": 50}
    for number, sample in enumerate(Split(tmp_path / "out" / "train")):
        assert sample.images == [photos[number]] and sample.id == f"{number:09d}@{number}"
        assert [turn["content"] for turn in sample.conversations[0]] == ["", f"a shape {number}"]


def test_several_images_and_leading_answers(photos, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(photos[number])
    records = [
        {"id": "two", "image": ["0.jpg", "1.jpg"], "conversations": turns("<image>\n<image>\nSame?", "no")},
        {"id": "cut", "conversations": [{"from": "gpt", "value": "..."}, *turns("Go on", "Yes")]},
    ]
    write_json(tmp_path / "x.json", records)
    manifest = prepare(Llava(tmp_path / "x.json", tmp_path), tmp_path / "out").manifests["train"]
    two, cut = Split(tmp_path / "out" / "train")
    assert two.images == photos[:2] and two.conversations[0][0]["content"] == "<image><image>Same?"
    assert [turn["content"] for turn in cut.conversations[0]] == ["Go on", "Yes"]
    assert manifest.statistics["answer without a question at the beginning left out"] == {"text": 1}


def test_a_killed_command_redoes_only_its_unfinished_shard(mix, tmp_path):
    """SIGKILL on the real command with two worker processes, then the same command again."""
    folder = mix[0]
    command = [sys.executable, "-m", "data_prep", "source=llava_mix665k", f"root={tmp_path}", "workers=2"]
    command += [
        f"source.json={folder}/llava_v1_5_mix665k.json",
        f"source.images={folder}",
        "source.samples_per_shard=100",
    ]
    split = tmp_path / "llava_mix665k" / "train"
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not len(receipts := list(split.glob("shard-?????.json"))) >= 3:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    receipts = list(split.glob("shard-?????.json"))
    before = {file: file.with_suffix(".arrow").stat().st_mtime_ns for file in receipts}
    assert 3 <= len(before) < 20 and not (split / "manifest.json").exists()
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith(f"{split}: made: 1980 samples")
    assert before == {file: file.with_suffix(".arrow").stat().st_mtime_ns for file in before}
    assert not list(split.glob(".*"))
    alone = prepare(Llava(folder / "llava_v1_5_mix665k.json", folder, samples_per_shard=100), tmp_path / "alone")
    assert Split(split).fingerprint == alone.manifests["train"].fingerprint


def test_array_of_tasks_equals_one_process(mix, tmp_path):
    folder = mix[0]
    source = Llava(folder / "llava_v1_5_mix665k.json", folder, samples_per_shard=200)
    whole = prepare(source, tmp_path / "whole").manifests["train"]
    for index in (2, 0, 1):
        last = prepare(source, tmp_path / "array", task=Task(index, 3))
    assert last.manifests["train"].fingerprint == whole.fingerprint
    assert last.manifests["train"].shards == whole.shards


@pytest.mark.parametrize("lines", [False, True])
def test_json_is_read_in_stretches(tmp_path, monkeypatch, lines):
    """Across every kind of chunk edge: the records of all stretches together are those of the file."""
    records = [{"id": n, "text": 'br[a]ce} "{\\ ünï 東京' * (n % 40), "deep": [[{"x": [n]}]]} for n in range(300)]
    file = tmp_path / "x.json"
    if lines:
        file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n")
    else:
        file.write_text(json.dumps(records, indent=1, ensure_ascii=False))
    monkeypatch.setattr(json_stream, "_CHUNK", 97)
    ends = json_stream.boundaries(file, 7)
    assert len(ends) == -(-300 // 7) + 1
    found = [list(json_stream.read(file, *span)) for span in zip(ends, ends[1:], strict=False)]
    assert [len(each) for each in found] == [7] * 42 + [6]
    assert sum(found, []) == records


def test_json_is_never_in_memory_as_a_whole(tmp_path):
    file = tmp_path / "big.json"
    record = json.dumps({"id": "x", "conversations": turns("q" * 500, "a" * 1500)})
    with file.open("w") as stream:
        stream.write("[" + ", ".join([record] * 30_000) + "]")
    assert file.stat().st_size > 50_000_000
    tracemalloc.start()
    ends = json_stream.boundaries(file, 1000)
    assert sum(1 for span in zip(ends, ends[1:], strict=False) for _ in json_stream.read(file, *span)) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": ', "is not whole: it ends in the middle of record 1, at byte 19"),
        ('[{"id": 1}, {"id": 2}', "is not whole: it ends after record 1"),
        ('[{"id": 1} "x"]', "byte 11: expected a record in braces"),
        ("[]", "holds no record"),
        ("", "holds no record"),
        ("<html>", "byte 0: expected a record in braces"),
    ],
)
def test_damaged_json_says_where(tmp_path, text, message):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        json_stream.boundaries(file, 10)


RECORDS = st.lists(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(RECORDS, st.sampled_from(["array", "lines", "pretty", "crlf"])), min_size=1, max_size=3),
    mark=st.booleans(),
    ascii_only=st.booleans(),
    every=st.integers(1, 5),
    chunk=st.integers(3, 60),
)
def test_any_container_gives_its_records(tmp_path, parts, mark, ascii_only, every, chunk):
    """Arrays and lines, one file after another, with a byte order mark and any line ends: every record, in order."""
    texts = []
    for records, form in parts:
        one = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
        match form:
            case "array":
                texts.append("[" + ",".join(one) + "]")
            case "pretty":
                texts.append(json.dumps(records, indent=2, ensure_ascii=ascii_only) + "\n")
            case "lines":
                texts.append("\n".join(one) + "\n")
            case _:
                texts.append("\r\n".join(one) + "\r\n")
    file = tmp_path / "x.json"
    begin = "\ufeff" if mark else ""
    file.write_bytes("".join(begin + text for text in texts).encode())
    with mock.patch.object(json_stream, "_CHUNK", chunk):
        ends = json_stream.boundaries(file, every)
    found = [list(json_stream.read(file, *span)) for span in zip(ends, ends[1:], strict=False)]
    assert sum(found, []) == [record for records, _ in parts for record in records]
    assert [len(each) for each in found[:-1]] == [every] * (len(found) - 1)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS, cut=st.floats(0, 1), junk=st.binary(max_size=6))
def test_damaged_containers_are_read_whole_or_refused(tmp_path, records, cut, junk):
    """Bytes put in anywhere: the records that are read are records of the file, or one line says what is wrong."""
    whole = json.dumps(records).encode()
    at = round(cut * len(whole))
    file = tmp_path / "x.json"
    file.write_bytes(whole[:at] + junk + whole[at:])
    try:
        ends = json_stream.boundaries(file, 2)
        found = [each for span in zip(ends, ends[1:], strict=False) for each in json_stream.read(file, *span)]
    except DataError as error:
        assert str(file) in str(error)
    else:
        assert len(found) >= len(records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}] and more', "byte 11: expected a record"),
        ('[{"a": ' + "[" * 100_000, "recursion|byte"),
        ('[{"a": ' + "9" * 5000 + "}]", "4300 digits"),
        ('{"a": 1}]', "expected a record"),
    ],
)
def test_what_follows_an_array_and_what_no_parser_likes(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        json_stream.boundaries(tmp_path / "x.json", 10)
    (tmp_path / "x.json").write_text('[{"a": 1}]', encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16; convert it"):
        json_stream.boundaries(tmp_path / "x.json", 10)


TEXTS = st.text(max_size=30)
KEYS = ["from", "value", "role", "content", "user", "assistant", "question", "answer", "type", "text"]


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | TEXTS | st.just("<image>\nWhat?"),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner | st.sampled_from(["human", "gpt", "user", "assistant", "text", "image"]),
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.integers(0, 2),
)
def test_any_value_is_dialogues_or_a_defect(value, images):
    """What a record may hold where its conversation should be: sound dialogues or one named defect, never an error."""
    try:
        dialogues, _ = from_text_or_turns(value, images)
        for dialogue in dialogues:
            check_dialogue(dialogue, images)
    except Defect as defect:
        assert defect.reason
    else:
        assert dialogues and all(dialogue[-1]["role"] == "assistant" for dialogue in dialogues)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=4))
def test_every_spelling_of_a_dialogue_is_the_same_dialogue(pairs):
    pairs = [(user.replace("\ufeff", ""), answer.replace("\ufeff", "")) for user, answer in pairs]
    flat = [text for pair in pairs for text in pair]
    names = (("human", "gpt"), ("user", "assistant"))
    spellings = [
        [{"from": names[0][n % 2], "value": text} for n, text in enumerate(flat)],
        [{"role": names[1][n % 2], "content": text} for n, text in enumerate(flat)],
        [{"role": names[1][n % 2], "content": [{"type": "text", "text": text}]} for n, text in enumerate(flat)],
        [{"from": names[0][n % 2], "value": text, "role": None, "content": None} for n, text in enumerate(flat)],
    ]
    wanted = [{"role": names[1][n % 2], "content": text} for n, text in enumerate(flat)]
    for turns_ in spellings:
        assert from_text_or_turns(turns_, 0) == ([wanted], 0)
    for user, assistant in (("user", "assistant"), ("question", "answer")):
        exchanges = [{user: one, assistant: other} for one, other in pairs]
        assert from_text_or_turns(exchanges, 0)[0] == [wanted[2 * n : 2 * n + 2] for n in range(len(pairs))]


def test_records_of_other_media_and_shapes_are_named(photos, tmp_path):
    """A video is no text; an absolute path inside the folder is one; the null and the empty image are none."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(photos[0])
    talk = turns("What?", "a")
    records = [
        {"id": "video", "video": "a.mp4", "conversations": turns("<video>\nWhat?", "a")},
        {"id": "absolute", "image": str(tmp_path / "images" / "0.jpg"), "conversations": turns("<image>\nWhat?", "a")},
        {"id": "outside", "image": "/etc/passwd", "conversations": turns("<image>\nWhat?", "a")},
        {"id": "null", "image": None, "conversations": talk},
        {"id": "empty", "image": "", "conversations": talk},
        {"id": "lost", "image": None, "conversations": turns("<image>\nWhat?", "a")},
        {"id": "messages", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"id": "none", "text": "a dog"},
    ]
    write_json(tmp_path / "x.json", records)
    source = Llava(tmp_path / "x.json", tmp_path / "images", split="test")
    manifest = prepare(source, tmp_path / "out", Options("drop", 1.0)).manifests["test"]
    found = {example["id"].split("@")[0]: example["reason"] for example in manifest.dropped_examples}
    assert found == {
        "video": "video is not read", "outside": "image path leaves its folder",
        "lost": "image tokens differ from images", "none": "conversation missing",
    }  # fmt: skip
    assert [len(s.images) for s in Split(tmp_path / "out" / "test")] == [1, 0, 0, 0]


def test_missing_json_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="x.json is missing; say where it is with source.json"):
        prepare(Llava(tmp_path / "x.json", tmp_path), tmp_path / "out")
