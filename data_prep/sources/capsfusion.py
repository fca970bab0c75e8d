"""CapsFusion-120M: URLs and captions in Parquet, the images fetched by img2dataset; docs/data.md has the command.

Columns of the Parquet: `image_url`, `laion_2b` (raw alternative text), `laion_coco` (BLIP), `capsfusion` (both
fused). img2dataset leaves, per shard, `00000.parquet` with what became of every URL, `00000_stats.json` once the
shard is done, and the images in `00000.tar` or in the Parquet's own column `jpg`.

A subset is chosen by hash: the rows with the smallest sha256 of their URL. It is the same wherever and in whatever
order the rows are read, a smaller subset is part of a larger one, and it can be cut out before anything is fetched:

    python -m data_prep.sources.capsfusion URLS SELECTED --fraction 0.4
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.arguments import Parser
from common.settings import setting
from data_prep.sources import below, tars
from data_prep.store.errors import DataError, Defect
from data_prep.store.sample import Count, Dropped, Sample
from data_prep.text.dialogues import exchange

SUCCESS = "success"
_BINS = 1 << 16


def hashes(urls: list[str]) -> np.ndarray:
    """First 8 bytes of every URL's sha256, as uint64 [n]."""
    digests = b"".join(hashlib.sha256((url or "").encode(errors="surrogatepass")).digest()[:8] for url in urls)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


@dataclass
class CapsFusion:
    """The source; one shard of img2dataset is one unit of work.

    Attributes:
        path: Img2dataset's output folder.
        caption: `capsfusion`, or `laion_2b` or `laion_coco` where img2dataset saved these columns as well.
        samples: Size of the subset, of the images that were fetched (a URL that occurs twice counts twice, and both of
            its rows are in the subset or neither); null: all.
    """

    path: Path = setting(path=True)
    caption: str = setting("capsfusion", choices=("capsfusion", "laion_2b", "laion_coco"))
    samples: int | None = setting(30_000_000, within="[1, 1e10]")

    def made_from(self) -> dict[str, Any]:
        """Names and sizes of img2dataset's files, and the settings."""
        files = sorted(file for file in self.path.glob("[0-9]*") if file.suffix in (".parquet", ".tar"))
        settings = {"caption": self.caption, "samples": self.samples}
        return {"source": "capsfusion", "files": tars.listing(self.path, files), **settings}

    def plan(self) -> dict[str, list[list[Any]]]:
        """Units `[shard, largest hash in the subset]`.

        Raises:
            DataError: no or unfinished shards, or fewer images than `samples`.
        """
        shards = sorted(file.stem for file in self.path.glob("[0-9]*.parquet"))
        if not shards:
            raise DataError(f"{self.path} holds no shard of img2dataset (00000.parquet, ...); see docs/data.md")
        unfinished = [shard for shard in shards if not self._stats(shard).is_file()]
        if unfinished:
            raise DataError(
                f"{self._stats(unfinished[0])} is missing: img2dataset has not finished {len(unfinished)} of "
                f"{len(shards)} shards; run its command again, it goes on where it stopped"
            )
        last = self._last_hash(shards)
        return {"train": [[shard, last] for shard in shards]}

    def read(self, split: str, unit: list[Any]) -> Iterator[Sample | Dropped | Count]:
        """Samples of one shard, in the order of its archive."""
        shard, last = unit
        below(self.path, shard)
        rows = self._rows(shard)
        statuses = rows["status"].to_pylist()
        keys, urls = rows["key"].to_pylist(), rows["url"].to_pylist()
        inside = np.array([status == SUCCESS for status in statuses], dtype=bool)
        yield from _failures(statuses, rows["error_message"].to_pylist())
        asked = json.loads(self._stats(shard).read_text(encoding="utf-8")).get("count", len(keys))
        if asked > len(keys):
            yield Count("not fetched", "not in img2dataset's table", asked - len(keys))
        if last is not None:
            chosen = inside & (hashes(urls) <= np.uint64(last))
            yield Count("outside the subset", "images", int(inside.sum() - chosen.sum()))
            inside = chosen
        captions = rows[self._column(shard, rows)].to_pylist()
        wanted = {keys[row]: captions[row] for row in np.flatnonzero(inside)}
        known = set(keys)
        for key, image in self._images(shard):
            if isinstance(image, Defect):
                yield Dropped(f"{shard}/{key}", image.reason, image.detail)
                wanted.pop(key, None)
            elif key in wanted:
                yield Sample(f"{shard}/{key}", [image], [exchange("", wanted.pop(key) or "")], "capsfusion")
            elif key not in known:
                yield Dropped(f"{shard}/{key}", "image without a row", f"{shard}.parquet has no key {key}")
        for key in wanted:
            yield Dropped(f"{shard}/{key}", "image missing", f"img2dataset counts it as fetched; not in shard {shard}")

    def _stats(self, shard: str) -> Path:
        return self.path / f"{shard}_stats.json"

    def _rows(self, shard: str) -> pa.Table:
        """Everything of a shard's table but the images and what is not used."""
        file = self.path / f"{shard}.parquet"
        try:
            names = pq.read_schema(file).names
            used = ("key", "url", "status", "error_message", "caption", "laion_2b", "laion_coco")
            table = pq.read_table(file, columns=[name for name in used if name in names])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read ({error}); delete shard {shard} and fetch it again") from error
        for name in ("key", "url", "status", "error_message"):
            if name not in table.column_names:
                raise DataError(f"{file} has no column {name}: it is not img2dataset's; columns are {', '.join(names)}")
        return table

    def _column(self, shard: str, rows: pa.Table) -> str:
        column = "caption" if self.caption == "capsfusion" else self.caption
        if column not in rows.column_names:
            raise DataError(
                f"{self.path / shard}.parquet has no column {column} for source.caption={self.caption}; fetch with "
                "--caption_col capsfusion and --save_additional_columns (docs/data.md)"
            )
        return column

    def _images(self, shard: str) -> Iterator[tuple[str, bytes | Defect]]:
        """Keys with their image files."""
        if (tar := self.path / f"{shard}.tar").is_file():
            for group in tars.groups(tar):
                found = [data for name, data in group.members.items() if name not in ("txt", "json")]
                if group.defect is None and len(found) != 1:
                    group.defect = Defect("image missing", f"members are {', '.join(group.members)}")
                yield group.key, group.defect or found[0]
            return
        file = pq.ParquetFile(self.path / f"{shard}.parquet")
        names = [name for name in ("jpg", "png", "webp") if name in file.schema_arrow.names]
        if not names:
            raise DataError(f"{tar} is missing, and {shard}.parquet holds no images; fetch shard {shard} again")
        for batch in file.iter_batches(batch_size=64, columns=["key", names[0]]):
            for key, data in zip(batch["key"].to_pylist(), batch[names[0]].to_pylist(), strict=True):
                if data is not None:
                    yield key, data

    def _last_hash(self, shards: list[str]) -> int | None:
        """Hash of the last row of the subset. Two passes over the tables, the second over one bin of the hashes."""
        if self.samples is None:
            return None
        counts = np.zeros(_BINS, dtype=np.int64)
        for values in map(self._fetched, shards):
            counts += np.bincount((values >> np.uint64(48)).astype(np.int64), minlength=_BINS)
        total = int(counts.sum())
        if total <= self.samples:
            if total < self.samples:
                raise DataError(
                    f"{self.path} holds {total} fetched images, source.samples={self.samples}; "
                    "fetch more, or take all with source.samples=null"
                )
            return None
        ends = np.cumsum(counts)
        at = int(np.searchsorted(ends, self.samples))
        rest = self.samples - int(ends[at] - counts[at])
        inside = [values[(values >> np.uint64(48)) == np.uint64(at)] for values in map(self._fetched, shards)]
        return int(np.sort(np.concatenate(inside))[rest - 1])

    def _fetched(self, shard: str) -> np.ndarray:
        table = pq.read_table(self.path / f"{shard}.parquet", columns=["url", "status"])
        statuses = table["status"].to_pylist()
        return hashes(
            [url for url, status in zip(table["url"].to_pylist(), statuses, strict=True) if status == SUCCESS]
        )


def _failures(statuses: list[str], messages: list[str | None]) -> Iterator[Count]:
    """How many rows were not fetched, by cause."""
    causes: Counter[str] = Counter()
    for status, message in zip(statuses, messages, strict=True):
        if status != SUCCESS:
            known = re.search(
                r"HTTP Error \d+|timed out|refused|not known|SSL|reset|decoding|hash mismatch", message or ""
            )
            causes[f"{status}: {known[0] if known else 'other'}"] += 1
    for cause, number in causes.items():
        yield Count("not fetched", cause, number)


def select(urls: Path, out: Path, fraction: float) -> tuple[int, int]:
    """Copy the rows of CapsFusion's Parquet files that belong to the `fraction` with the smallest hashes.

    Returns:
        Rows kept and rows read.

    Raises:
        DataError: no files, another fraction than above 0 and up to 1, or no column `image_url`.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"--fraction {fraction}: above 0 and at most 1")
    files = sorted(urls.glob("*.parquet"))
    if not files:
        raise DataError(f"{urls} holds no .parquet file")
    out.mkdir(parents=True, exist_ok=True)
    last = np.uint64(min(round(fraction * 2**64), 2**64 - 1))
    kept = total = 0
    for source in files:
        file = pq.ParquetFile(source)
        if "image_url" not in file.schema_arrow.names:
            raise DataError(f"{source} has no column image_url; columns are {', '.join(file.schema_arrow.names)}")
        temporary = out / f".{source.name}.tmp"
        with pq.ParquetWriter(temporary, file.schema_arrow) as writer:
            for batch in file.iter_batches(1 << 16):
                chosen = hashes(batch["image_url"].to_pylist()) <= last
                writer.write_batch(batch.filter(pa.array(chosen)))
                kept, total = kept + int(chosen.sum()), total + len(chosen)
        temporary.replace(out / source.name)
    return kept, total


def main() -> int:
    """Cut a subset out of CapsFusion's Parquet files before fetching."""
    parser = Parser(prog="python -m data_prep.sources.capsfusion", description=main.__doc__)
    parser.add_argument("urls", type=Path, help="folder of CapsFusion's Parquet files")
    parser.add_argument("out", type=Path, help="folder for the smaller ones")
    parser.add_argument("--fraction", type=float, required=True, help="share of the rows to keep, e.g. 0.4")
    arguments = parser.parse_args()
    kept, total = select(arguments.urls, arguments.out, arguments.fraction)
    print(f"{arguments.out}: {kept} of {total} rows")
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
