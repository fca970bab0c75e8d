"""Any Hugging Face data set on disk with images and text: saved by `save_to_disk`, or files `datasets` can load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.settings import setting
from data_prep.sources import each, tars
from data_prep.sources.columns import Columns, image_bytes
from data_prep.sources.columns import dialogues as read_row
from data_prep.sources.columns import find as find_columns
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import read_image
from data_prep.store.sample import Count, Dropped, Sample

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class HuggingFace:
    """The source. Nothing is downloaded: `huggingface-cli download --repo-type dataset` does that.

    Attributes:
        path: Folder of `save_to_disk`, or of Parquet, Arrow, JSON or CSV files or images with metadata.
        split: Which of its splits.
        image: Column of the images: image features, bytes, base64, or paths below `path`; one or a list. Null: found by
            its name; empty: the rows have none.
        text: Column of captions, turns or exchanges, or of the answers to `question`; null: found by its name.
        question: Column of questions; null: found by its name, where `text` is null too.
        label: Source of the samples.
        samples_per_shard: Rows in a unit of work.
    """

    path: Path = setting(path=True)
    split: str = "train"
    image: str | None = setting(None, empty=True)
    text: str | None = None
    question: str | None = None
    label: str = "hf"
    samples_per_shard: int = setting(5000, within="[1, 1e7]")

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
        rows, step = len(self._open().rows), self.samples_per_shard
        return {self.split: [[start, min(start + step, rows)] for start in range(0, rows, step)]}

    def read(self, split: str, unit: list[int]) -> Iterator[Sample | Dropped | Count]:
        """Samples of a range of rows; ids are row numbers."""
        start, stop = unit
        table = self._open()

        def make(name: str, row: dict[str, Any]) -> Iterator[Sample | Count]:
            for column, names in table.classes.items():  # -1 and null: no class is known
                row[column] = names[row[column]] if row[column] is not None and row[column] >= 0 else ""
            return self._sample(name, row, table.columns)

        rows = enumerate(table.rows.select(range(start, stop)), start)
        return each(((f"{self.label}/{number}", row) for number, row in rows), make)

    def _sample(self, name: str, row: dict[str, Any], columns: Columns) -> Iterator[Sample | Count]:
        images = []
        if columns.image:
            cell = row[columns.image]
            images = [self._bytes(value) for value in (cell if isinstance(cell, list) else [cell])]
        dialogues, references, tokens = read_row(row, columns, len(images))
        if tokens:
            yield Count("image tokens taken out", self.label, tokens)
        if columns.caption:
            yield Count("captions left out", columns.caption)
        yield Sample(name, images, dialogues, self.label, references)

    def _bytes(self, value: Any) -> bytes:
        found = image_bytes(value)
        if found is None:
            raise Defect("image missing", "the cell is empty; rows without images are read with source.image=''")
        if isinstance(found, bytes):
            return found
        file, folder = (self.path / found).resolve(), self.path.resolve()
        if not file.is_relative_to(folder):
            raise Defect("image path leaves its folder", found)
        return read_image(file)

    def _open(self) -> _Table:
        return _open(self.path, self.split, self.image, self.text, self.question)


@dataclass(frozen=True)
class _Table:
    """The used columns of a data set, images left undecoded, what each is, and the names of the classes of some."""

    rows: Dataset
    columns: Columns
    classes: dict[str, list[str]]


@cache
def _open(path: Path, split: str, image: str | None, text: str | None, question: str | None) -> _Table:
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
    if image is None:  # a column of images, whatever its name
        image = next((name for name, kind in loaded.features.items() if _holds_images(kind)), None)
    columns = find_columns(loaded.column_names, image, text, question, str(path))
    loaded = loaded.select_columns(columns.used)
    classes = {}
    for name, kind in list(loaded.features.items()):
        if isinstance(kind, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
        elif _holds_images(kind):
            loaded = loaded.cast_column(name, datasets.List(datasets.Image(decode=False)))
        elif isinstance(kind, datasets.ClassLabel):
            classes[name] = [each.replace("_", " ") for each in kind.names]
    return _Table(loaded, columns, classes)


def _holds_images(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.Image) or (
        isinstance(kind, datasets.List) and isinstance(kind.feature, datasets.Image)
    )
