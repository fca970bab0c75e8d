"""Any Hugging Face data set on disk with images and text: saved by `save_to_disk`, or files `datasets` can load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.sources import each, tars
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import read_image
from data_prep.store.sample import Count, Dropped, Sample
from data_prep.text.dialogues import exchange, from_text_or_turns

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class HuggingFace:
    """The source. Nothing is downloaded: `huggingface-cli download --repo-type dataset` does that.

    Attributes:
        path: Folder of `save_to_disk`, or of Parquet, Arrow, JSON or CSV files or images with metadata.
        split: Which of its splits.
        image: Column of the images: image features, bytes, or paths below `path`; one or a list. None: text-only.
        text: Column of the captions, of the answers (with `question`), or of lists of turns.
        question: Column of questions; null: `text` holds captions or turns.
        label: Source of the samples.
        samples_per_shard: Rows in a unit of work.
    """

    path: Path
    split: str = "train"
    image: str = "image"
    text: str = "text"
    question: str | None = None
    label: str = "hf"
    samples_per_shard: int = 5000

    def made_from(self) -> dict[str, Any]:
        """Names and sizes of the files, and the settings."""
        if not self.path.is_dir():
            raise DataError(f"source.path={self.path}: no such folder; nothing is downloaded here (docs/data.md)")
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        if tar := next((file for file in files if file.suffix == ".tar"), None):
            raise DataError(f"{tar}: use source=webdataset for tars")
        settings = {name: value for name, value in vars(self).items() if name != "path"}
        return {"source": "hf", "files": tars.listing(self.path, files), **settings}

    def plan(self) -> dict[str, list[list[int]]]:
        """Units `[first row, end]`."""
        rows, step = len(self._open()), self.samples_per_shard
        return {self.split: [[start, min(start + step, rows)] for start in range(0, rows, step)]}

    def read(self, split: str, unit: list[int]) -> Iterator[Sample | Dropped | Count]:
        """Samples of a range of rows; ids are row numbers."""
        start, stop = unit
        rows = enumerate(self._open().select(range(start, stop)), start)
        return each(((f"{self.label}/{number}", row) for number, row in rows), self._sample)

    def _sample(self, name: str, row: dict[str, Any]) -> Iterator[Sample | Count]:
        listed = row[self.image]
        images = [self._bytes(each) for each in (listed if isinstance(listed, list) else [listed]) if each is not None]
        if self.question:
            dialogue, tokens = exchange(row[self.question], row[self.text]), 0
        else:
            dialogue, tokens = from_text_or_turns(row[self.text], len(images))
        if tokens:
            yield Count("image tokens taken out", self.label, tokens)
        yield Sample(name, images, [dialogue], self.label)

    def _bytes(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        path = value
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return value["bytes"]
            path = value.get("path")
        if not isinstance(path, str) or not path:
            raise Defect("image missing", f"neither bytes nor a path but {value!r}"[:100])
        file, folder = (self.path / path).resolve(), self.path.resolve()
        if not file.is_relative_to(folder):
            raise Defect("image path leaves its folder", path)
        return read_image(file)

    def _open(self) -> Dataset:
        return _open(self.path, self.split, (self.image, self.text, *filter(None, [self.question])))


@cache
def _open(path: Path, split: str, columns: tuple[str, ...]) -> Dataset:
    """The data set, its images left undecoded."""
    import datasets

    try:
        if (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path / split))
        else:
            loaded = datasets.load_dataset(str(path), split=split)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"datasets cannot load split {split} of {path}: {error}") from error
    for column in columns:
        if column not in loaded.column_names:
            raise DataError(f"{path} has no column {column}; columns are {', '.join(loaded.column_names)}")
    loaded = loaded.select_columns(list(dict.fromkeys(columns)))
    undecoded, kind = datasets.Image(decode=False), loaded.features[columns[0]]
    if isinstance(kind, datasets.Image):
        loaded = loaded.cast_column(columns[0], undecoded)
    elif isinstance(kind, datasets.List) and isinstance(kind.feature, datasets.Image):
        loaded = loaded.cast_column(columns[0], datasets.List(undecoded))
    return loaded
