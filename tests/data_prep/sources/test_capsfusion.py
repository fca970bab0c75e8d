"""CapsFusion as img2dataset 1.47 leaves it: failures in the tables, images in tars or tables; the hashed subset."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import Options, prepare
from data_prep.sources.capsfusion import CapsFusion, select
from data_prep.store.errors import DataError
from data_prep.store.split import Split
from tests.data_prep.miniature import bad_images, pictures

TEXTS = ("laion_2b", "laion_coco", "caption", "url", "key", "status", "error_message")
NUMBERS = ("width", "height", "original_width", "original_height")
COLUMNS = [*((name, "string") for name in TEXTS), *((name, "int32") for name in NUMBERS)]
COLUMNS += [("exif", "string"), ("sha256", "string")]
SIZE = 100


@pytest.fixture(scope="module")
def photos(part):
    return pictures(part("easy_vqa"), 300)


def rows_of(photos):
    """300 URLs; every seventh failed to download, every fiftieth to decode."""
    for number, data in enumerate(photos):
        shard, at = divmod(number, SIZE)
        row = {
            "url": f"https://example.org/{number}.jpg",
            "caption": f"A fused caption, number {number}.",
            "laion_2b": f"raw {number}",
            "laion_coco": f"blip {number}",
            "key": f"{shard:05d}{at:04d}",
            "status": "success",
            "error_message": None,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        if number % 7 == 3:
            row |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", "sha256": None}
        elif number % 50 == 11:
            row |= {"status": "failed_to_resize", "error_message": "image decoding error", "sha256": None}
        yield shard, row, data if row["status"] == "success" else None


def write_shards(folder, photos, output_format="webdataset", change=lambda key, data: data):
    """The output folder of img2dataset; `change` may spoil or remove (none) what the archive holds of a key."""
    folder.mkdir(parents=True)
    shards = {}
    for shard, row, data in rows_of(photos):
        shards.setdefault(shard, []).append((row, data))
    for shard, listed in shards.items():
        listed = listed[::-1]  # it writes in the order of completion
        schema = pa.schema([(name, kind) for name, kind in COLUMNS])
        table = {name: [row.get(name) for row, _ in listed] for name in schema.names}
        if output_format == "parquet":
            schema = schema.append(pa.field("jpg", pa.binary())).append(pa.field("txt", pa.string()))
            table["jpg"] = [data if data is None else change(row["key"], data) for row, data in listed]
            table["txt"] = [row["caption"] if data else None for row, data in listed]
        else:
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
                for row, data in listed:
                    if data is None or (data := change(row["key"], data)) is None:
                        continue
                    texts = {"txt": row["caption"].encode(), "json": json.dumps(row, indent=4).encode()}
                    for suffix, content in {"jpg": data, **texts}.items():
                        info = tarfile.TarInfo(f"{row['key']}.{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
        pq.write_table(pa.table(table, schema), folder / f"{shard:05d}.parquet")
        counts = {"count": SIZE, "successes": sum(data is not None for _, data in listed)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(counts, indent=4))
    return folder


def fetched(photos):
    return {f"{row['key'][:5]}/{row['key']}": (row, data) for _, row, data in rows_of(photos) if data is not None}


@pytest.mark.parametrize("output_format", ["webdataset", "parquet"])
def test_all_fetched_pairs_and_all_failures(photos, tmp_path, output_format):
    folder = write_shards(tmp_path / "in", photos, output_format)
    manifest = prepare(CapsFusion(folder, samples=None), tmp_path / "out").manifests["train"]
    expected = fetched(photos)
    samples = {sample.id: sample for sample in Split(tmp_path / "out" / "train")}
    assert samples.keys() == expected.keys() and not manifest.dropped
    for name, (row, data) in expected.items():
        assert samples[name].images == [data]
        assert [turn["content"] for turn in samples[name].conversations[0]] == ["", row["caption"]]
    lost = manifest.statistics["not fetched"]
    assert lost == {"failed_to_download: HTTP Error 404": 43, "failed_to_resize: decoding": 6}
    assert len(expected) + sum(lost.values()) == 300


@pytest.mark.parametrize("samples", [1, 60, 200])
def test_subset_is_the_smallest_hashes(photos, tmp_path, samples):
    folder = write_shards(tmp_path / "in", photos)
    manifest = prepare(CapsFusion(folder, samples=samples), tmp_path / "out").manifests["train"]
    by_hash = sorted(fetched(photos).items(), key=lambda item: hashlib.sha256(item[1][0]["url"].encode()).digest())
    assert {sample.id for sample in Split(tmp_path / "out" / "train")} == {name for name, _ in by_hash[:samples]}
    assert sum(manifest.statistics["outside the subset"].values()) == len(by_hash) - samples


def test_selection_before_fetching_is_the_same_subset(photos, tmp_path):
    """Real columns; the rows kept by the command hold the subset that would be taken from everything."""
    rows = [row for _, row, _ in rows_of(photos)]
    names = {"image_url": "url", "laion_2b": "laion_2b", "laion_coco": "laion_coco", "capsfusion": "caption"}
    (tmp_path / "urls").mkdir()
    for number in range(3):
        part = rows[number * 100 : (number + 1) * 100]
        table = pa.table({name: [row[key] for row in part] for name, key in names.items()})
        pq.write_table(table, tmp_path / "urls" / f"capsfusion_{number}.parquet")
    command = [sys.executable, "-m", "data_prep.sources.capsfusion", tmp_path / "urls", tmp_path / "half"]
    said = subprocess.run([*command, "--fraction", "0.5"], capture_output=True, text=True, check=True).stdout
    tables = [pq.read_table(file) for file in sorted((tmp_path / "half").glob("*.parquet"))]
    urls = [url for table in tables for url in table["image_url"].to_pylist()]
    assert len(tables) == 3 and tables[0].column_names == list(names)
    assert said == f"{tmp_path / 'half'}: {len(urls)} of 300 rows\n"
    assert set(urls) == {row["url"] for row in rows if hashlib.sha256(row["url"].encode()).digest()[0] < 128}
    with pytest.raises(DataError, match="fraction 2"):
        select(tmp_path / "urls", tmp_path / "x", 2)


def test_other_captions(photos, tmp_path):
    folder = write_shards(tmp_path / "in", photos)
    for caption in ("laion_2b", "laion_coco"):
        prepare(CapsFusion(folder, caption, samples=None), tmp_path / caption)
        for sample in Split(tmp_path / caption / "train"):
            number = int(sample.id[:5]) * SIZE + int(sample.id[-4:])
            assert (
                sample.conversations[0][1]["content"]
                == f"{caption.replace('laion_', '').replace('2b', 'raw').replace('coco', 'blip')} {number}"
            )
    with pytest.raises(DataError, match="no column alt for source.caption=alt"):
        prepare(CapsFusion(folder, "alt", samples=None), tmp_path / "alt")


def test_what_the_table_and_the_archive_disagree_on(photos, tmp_path):
    bad = bad_images(photos[0])
    del bad["image file too large"]
    keys = [name.split("/")[1] for name in fetched(photos)]
    spoiled = dict(zip(keys[::20], bad.items(), strict=False))
    gone = keys[5]

    def change(key, data):
        return None if key == gone else spoiled[key][1] if key in spoiled else data

    folder = write_shards(tmp_path / "in", photos, change=change)
    with tarfile.open(folder / "00000.tar", "a") as archive:
        info = tarfile.TarInfo("000009999.jpg")
        info.size = len(photos[0])
        archive.addfile(info, io.BytesIO(photos[0]))
    table = pq.read_table(folder / "00002.parquet")
    pq.write_table(table.slice(0, 98), folder / "00002.parquet")  # two URLs crashed in img2dataset itself
    manifest = prepare(CapsFusion(folder, samples=None), tmp_path / "out", Options("drop", 0.1)).manifests["train"]
    found = {(example["id"][6:], example["reason"]) for example in manifest.dropped_examples}
    expected = {(key, reason) for key, (reason, _) in spoiled.items()}
    assert expected | {(gone, "image missing"), ("000009999", "image without a row")} <= found
    assert manifest.statistics["not fetched"]["not in img2dataset's table"] == 2


def test_unfinished_and_foreign_folders(photos, tmp_path):
    folder = write_shards(tmp_path / "in", photos)
    (folder / "00001_stats.json").unlink()
    with pytest.raises(DataError, match="00001_stats.json is missing: img2dataset has not finished 1 of 3 shards"):
        prepare(CapsFusion(folder, samples=None), tmp_path / "out")
    (folder / "00001_stats.json").write_text("{}")
    with pytest.raises(DataError, match="holds 251 fetched images, source.samples=30000000"):
        prepare(CapsFusion(folder), tmp_path / "out")
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match="00001.tar is missing, and 00001.parquet holds no images"):
        prepare(CapsFusion(folder, samples=None), tmp_path / "out")
    with pytest.raises(DataError, match="holds no shard of img2dataset"):
        prepare(CapsFusion(tmp_path), tmp_path / "out")
