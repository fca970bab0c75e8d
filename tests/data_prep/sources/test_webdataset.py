"""Tars of images and text: what is read, what is refused, and damage that the tar library takes for the end."""

import io
import json
import tarfile

import pytest

from data_prep.prepare import Options, prepare
from data_prep.sources import tars
from data_prep.sources.webdataset import WebDataset
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from tests.data_prep.miniature import bad_images, pictures, turns


@pytest.fixture(scope="module")
def photos(part):
    return pictures(part("easy_vqa"), 40)


def write_tar(file, members):
    """Members are (name or TarInfo, bytes)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_pairs_come_back(photos, tmp_path):
    for shard in range(2):
        rows = enumerate(photos[shard * 20 : (shard + 1) * 20])
        members = [
            (f"d/{n:05d}.{x}", y)
            for n, p in rows
            for x, y in (("JPG", p), ("txt", b"a shape " + str(n).encode()), ("cls", b"1"))
        ]
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", [(special("d", tarfile.DIRTYPE), b""), *members])
    manifest = prepare(WebDataset(tmp_path / "tars"), tmp_path / "out").manifests["train"]
    split = Split(tmp_path / "out" / "train")
    assert not manifest.dropped and manifest.statistics["archive members not used"] == {"cls": 40}
    assert [sample.images for sample in split] == [[photo] for photo in photos]
    assert split[23].id == "00001/d/00003" and [t["content"] for t in split[23].conversations[0]] == ["", "a shape 3"]


def test_turns_in_json(photos, tmp_path):
    records = [
        {"talk": turns("<image>\nWhat?", "a")},
        {"talk": "a caption"},
        {"talk": turns("<image><image>", "a")},
        {},
    ]
    members = []
    for n, record in enumerate(records):
        members += [(f"{n}.png", photos[n]), (f"{n}.json", json.dumps(record).encode())]
    write_tar(tmp_path / "x.tar", [*members, ("4.png", photos[4]), ("4.json", b"{"), ("5.png", photos[5])])
    source = WebDataset(tmp_path, text="json:talk")
    manifest = prepare(source, tmp_path / "out", Options("drop", 1.0)).manifests["train"]
    found = {example["id"]: example["reason"] for example in manifest.dropped_examples}
    assert found == {
        "x/2": "image tokens differ from images", "x/3": "text missing", "x/4": "json malformed", "x/5": "text missing",
    }  # fmt: skip
    assert [s.conversations[0][0]["content"] for s in Split(tmp_path / "out" / "train")] == ["What?", ""]


def test_hostile_and_damaged_members_are_refused_and_named(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 100_000)
    photo, text = photos[0], b"a"
    planted = {
        "archive member leaves its folder": [("../../outside.jpg", photo), ("../../outside.txt", text)],
        "archive member is no plain file": [(special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""), ("l.txt", text)],
        "archive member is a pickle": [("p.jpg", photo), ("p.txt", text), ("p.pyd", b"cos\nsystem\n")],
        "archive member too large": [("big.jpg", photo), ("big.txt", b"x" * 100_001)],
        "archive member twice": [("twice.jpg", photo), ("twice.jpg", photo), ("twice.txt", text)],
        "image missing": [("alone.txt", text)],
        "text missing": [("silent.jpg", photo)],
        "several images": [("two.jpg", photo), ("two.png", photo), ("two.txt", text)],
        "text is not UTF-8": [("latin.jpg", photo), ("latin.txt", "é".encode("latin-1"))],
        "answer empty": [("empty.jpg", photo), ("empty.txt", b" ")],
    }
    planted |= {
        reason: [(f"i{n}.jpg", data), (f"i{n}.txt", text)]
        for n, (reason, data) in enumerate(bad_images(photo).items())
        if reason != "image file too large"
    }
    planted["archive member leaves its folder "] = [("/absolute.jpg", photo), ("/absolute.txt", text)]
    planted["archive member is no plain file "] = [(special("h.jpg", tarfile.LNKTYPE, "0.jpg"), b""), ("h.txt", text)]
    planted["archive member is no plain file  "] = [(special("f.jpg", tarfile.FIFOTYPE), b""), ("f.txt", text)]
    members = []
    for number, bad in enumerate(planted.values()):
        members += [(f"{number}.jpg", photos[number]), (f"{number}.txt", text), *bad]
    write_tar(tmp_path / "in" / "x.tar", members)
    manifest = prepare(WebDataset(tmp_path / "in"), tmp_path / "out", Options("drop", 1.0)).manifests["train"]
    expected = {reason.strip(): sum(other.strip() == reason.strip() for other in planted) for reason in planted}
    assert manifest.dropped == dict(sorted(expected.items()))
    assert [s.id for s in Split(tmp_path / "out" / "train")] == [f"x/{number}" for number in range(len(planted))]
    written = {file.name for file in tmp_path.rglob("*")}
    assert not written & {"outside.jpg", "absolute.jpg", "p.pyd"}


@pytest.mark.parametrize(
    "damage", ["cut at a member", "cut in a member", "cut in a header", "header overwritten", "empty"]
)
def test_damaged_archives_are_noticed(photos, tmp_path, damage):
    """What came before the damage is kept; the rest is one named defect, never a quiet end."""
    file = tmp_path / "in" / "x.tar"
    write_tar(file, [(f"{n}.{x}", y) for n in range(20) for x, y in (("jpg", photos[n]), ("txt", b"a"))])
    with tarfile.open(file) as archive:
        headers = {member.name: member.offset for member in archive}
    data = bytearray(file.read_bytes())
    at = headers["10.jpg"]
    if damage == "header overwritten":
        data[at : at + 512] = b"\xff" * 512
    else:
        data = data[
            : {"cut at a member": at, "cut in a member": at + 700, "cut in a header": at + 100, "empty": 0}[damage]
        ]
    file.write_bytes(data)
    manifest = prepare(
        WebDataset(tmp_path / "in"), tmp_path / "out", Options("drop", 0.5 if damage != "empty" else 1)
    ).manifests["train"]
    assert manifest.dropped == {"archive damaged": 1} and manifest.dropped_examples[0]["id"] == "x/x.tar"
    # The sample before the damage may have lost members behind it, so it goes too.
    assert manifest.samples in ((9, 10) if damage != "empty" else (0,))


def test_what_archives_hold_besides_samples_is_no_defect(photos, tmp_path):
    """macOS leftovers between the members, a README, a licence; and what Windows editors leave in a text."""
    photo, text = photos[0], b"\xef\xbb\xbfa shape\r\nin two lines\r\n"
    write_tar(tmp_path / "in" / "x.tar", [
        ("README.md", b"# Shapes"), ("LICENSE", b"MIT"), ("notice.txt", b"by us"), ("._0.jpg", b"\0\5\x16\7"),
        ("0.jpg", photo), ("._0.txt", b"\0\5\x16\7"), ("0.txt", text), ("__MACOSX/._1.jpg", b"x"), (".DS_Store", b"x"),
        ("1.jpg", photo), ("1.txt", b"b"),
    ])  # fmt: skip
    manifest = prepare(WebDataset(tmp_path / "in"), tmp_path / "out").manifests["train"]
    split = Split(tmp_path / "out" / "train")
    assert [s.conversations[0][1]["content"] for s in split] == ["a shape\nin two lines", "b"]
    assert manifest.statistics["archive members not used"] == {
        "._*, of macOS": 4, "README": 1, "LICENSE": 1, "notice": 1,
    }  # fmt: skip


@pytest.mark.parametrize("names", [("train/0.tar", "test/0.tar"), ("a/shapes-train-0.tar", "a/shapes-test-0.tar")])
def test_splits_of_tars_are_never_pooled(photos, tmp_path, names):
    for number, name in enumerate(names):
        write_tar(tmp_path / "in" / name, [("0.jpg", photos[number]), ("0.txt", b"a")])
    prepare(WebDataset(tmp_path / "in"), tmp_path / "out")
    for number, split in enumerate(("train", "test")):
        assert [s.images for s in Split(tmp_path / "out" / split)] == [[photos[number]]]
    only = prepare(WebDataset(tmp_path / "in", split="test"), tmp_path / "only")
    assert list(only.manifests) == ["test"]
    with pytest.raises(DataError, match="source.split=val: .* has tars of test, train"):
        prepare(WebDataset(tmp_path / "in", split="val"), tmp_path / "none")
    write_tar(tmp_path / "in" / "loose.tar", [("0.jpg", photos[0]), ("0.txt", b"a")])
    with pytest.raises(DataError, match="loose.tar and 0 more lie beside tars of test, train"):
        prepare(WebDataset(tmp_path / "in"), tmp_path / "loose")


def test_a_unit_that_leaves_the_folder_is_not_read(photos, tmp_path):
    """As somebody else may have written it into plan.json."""
    write_tar(tmp_path / "outside.tar", [("0.jpg", photos[0]), ("0.txt", b"a")])
    (tmp_path / "in").mkdir()
    for unit in ("../outside.tar", str(tmp_path / "outside.tar")):
        with pytest.raises(DataError, match="leads out of this folder"):
            list(WebDataset(tmp_path / "in").read("train", unit))


def test_one_tar_is_no_folder(tmp_path):
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match=f"x.tar is one archive; say source.path={tmp_path}"):
        prepare(WebDataset(tmp_path / "x.tar"), tmp_path / "out")


def test_no_tars(tmp_path):
    (tmp_path / "x.tar.gz").touch()
    with pytest.raises(DataError, match="holds no .tar file"):
        prepare(WebDataset(tmp_path), tmp_path / "out")
