"""Your own pictures: a folder of images whose names or tables say what they show, to captions and questions in splits.

Three shapes are known, each with or without folders `train`, `val`, `test` above it:

    cat/1.jpg  dog/2.jpg                 one folder per class: its name is the answer
    red_circle_01.png  blue_cup.jpg      no class folders: the file's name, without its number, is the answer
    questions.csv (.tsv .jsonl .json)    rows of image, question and answer, of image and caption, or of all; also
                                         `datasets`' imagefolder with `metadata.csv`; columns as in
                                         `data_prep.sources.columns`

Splits that are made: `train`, `val`, `test` with questions, and, where there are captions, `caption_train` and
`caption_val` of the same images for pretraining. All rows of an image are one sample.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.settings import setting
from data_prep.division import check_fractions
from data_prep.sources import SPLITS, columns, json_stream, tars
from data_prep.sources.columns import Columns
from data_prep.sources.llava import SUFFIXES, find_image
from data_prep.store.errors import DataError, Defect
from data_prep.store.images import read_image
from data_prep.store.sample import Count, Dialogue, Dropped, Reference, Sample
from data_prep.text.dialogues import exchange

TABLES = (".csv", ".tsv", ".jsonl", ".json")
CAPTION = "caption_"
"""What the names of splits of captions begin with."""


@dataclass
class Folder:
    """The source.

    Attributes:
        path: The folder, or a table in it.
        image, text, question: Columns of a table; null: found by their names.
        ask: The question whose answer is a class, a name or a caption.
        opening: Opens the sentence that a caption ends, so that a frozen language model already expects what the image
            has to supply; empty: a plain caption.
        val_fraction, test_fraction: Shares of the images that become `val` and `test`, where they are not there.
        label: Source of the samples.
        samples_per_shard: Images in a unit of work.
    """

    path: Path = setting(path=True)
    image: str | None = None
    text: str | None = None
    question: str | None = None
    ask: str = "What is in the picture?"
    opening: str = setting("The picture shows", empty=True)
    val_fraction: float = setting(0.1, within="[0, 1)")
    test_fraction: float = setting(0.1, within="[0, 1)")
    label: str = "folder"
    samples_per_shard: int = setting(1000, within="[1, 1e7]")

    def made_from(self) -> dict[str, Any]:
        """Names and sizes of all files, and the settings."""
        folder = self._listing.folder
        settings = {name: value for name, value in vars(self).items() if name != "path"}
        files = [folder / name for name in self._listing.files]
        found = {"source": "folder", "files": tars.listing(folder, files), **settings}
        # 2: captions beside questions; other data are as they were.
        return found | ({"reader": 2} if self._listing.columns and self._listing.columns.caption else {})

    def plan(self) -> dict[str, list[list[str]]]:
        """Units are lists of images, as paths below the folder; a path is a sample's key.

        Raises:
            DataError: nothing that is known, with what was found.
        """
        check_fractions(self.val_fraction, self.test_fraction)
        listing, planned = self._listing, {}
        for split, names in self._divided().items():
            step = self.samples_per_shard
            units = [names[at : at + step] for at in range(0, len(names), step)]
            planned[split] = units
            if split != "test" and any(listing.tells(name) for name in names):
                planned[CAPTION + split] = units
        return planned

    def read(self, split: str, unit: list[str]) -> Iterator[Sample | Dropped | Count]:
        """Samples of a unit."""
        for name in unit:
            try:
                yield from self._sample(name, split.startswith(CAPTION))
            except Defect as defect:
                yield Dropped(f"{self.label}/{name}", defect.reason, defect.detail)

    def _sample(self, name: str, captions: bool) -> Iterator[Sample | Count]:
        listing = self._listing
        dialogues: list[Dialogue] = []
        references: list[Reference] = []
        row_references: list[Reference]
        beside = captions and listing.columns is not None and listing.columns.caption is not None
        for row in listing.rows[name]:
            if listing.columns is None:
                row_dialogues, row_references, tokens = [exchange("", row["name"])], [], 0
            elif beside:
                row_dialogues = [exchange("", text) for text in columns.captions(row, listing.columns)]
                row_references, tokens = [], 0
            else:
                row_dialogues, row_references, tokens = columns.dialogues(row, listing.columns, 1)
            if tokens and not captions:
                yield Count("image tokens taken out", self.label, tokens)
            for number, talk in enumerate(row_dialogues):
                is_caption = len(talk) == 2 and not talk[0]["content"]
                if is_caption:
                    talk = exchange(self.opening if captions else self.ask, talk[1]["content"])
                if beside and talk in dialogues:
                    continue  # rows of an image, one a question, repeat its caption
                if is_caption or not captions:
                    dialogues.append(talk)
                    references += row_references[number : number + 1]
        if not dialogues:
            return  # no caption of this image
        image = read_image(find_image(listing.folder, name))
        whole = references if len(references) == len(dialogues) else []
        yield Sample(f"{self.label}/{name}", [image], dialogues, self.label, whole)

    @property
    def _listing(self) -> Listing:
        return _listing(self.path, self.image, self.text, self.question)

    def _divided(self) -> dict[str, list[str]]:
        """Images of each split. Those without one are divided so that each class gives its share, equal files stay
        together, and the sizes are exact.
        """
        listing = self._listing
        splits: dict[str, list[str]] = {}
        for name, split in listing.splits.items():
            splits.setdefault(split or "train", []).append(name)
        given = set(splits)
        by_content: dict[tuple[str, str], list[str]] = {}
        for name in splits.get("train", []):
            by_content.setdefault((listing.group(name), _content(listing.folder, name)), []).append(name)
        contents = sorted(by_content)
        total = len(contents)
        for part, share in (("test", self.test_fraction), ("val", self.val_fraction)):
            if part in given or not share:
                continue
            step = share * total / max(1, len(contents))  # the share is of all, some of which are taken already
            taken = [key for n, key in enumerate(contents) if int((n + 1) * step + 0.5) > int(n * step + 0.5)]
            if not taken or len(taken) == len(contents):
                raise DataError(
                    f"{self.path}: {total} different images are too few to divide by {part}_fraction={share}; "
                    "add images, or set it to 0"
                )
            contents = [key for key in contents if key not in set(taken)]
            splits[part] = sorted(name for key in taken for name in by_content[key])
        splits["train"] = sorted(name for key in contents for name in by_content[key])
        return {split: names for split in ("train", "val", "test") if (names := splits.get(split))}


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        folder: That the names are below.
        files: Names of all files that the data depend on.
        rows: What is said of each image, by its name: rows of the table, or its class.
        splits: The split of each image; none: to be divided.
        columns: Of the table; none: there is no table.
    """

    folder: Path
    files: list[str]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    splits: dict[str, str | None] = field(default_factory=dict)
    columns: Columns | None = None

    def add(self, name: str, row: dict[str, Any], split: str | None) -> None:
        """Note a row about an image.

        Raises:
            DataError: the image is in another split as well.
        """
        if self.splits.setdefault(name, split) != split:
            raise DataError(f"{self.folder / name} is in two splits, {self.splits[name]} and {split}")
        self.rows.setdefault(name, []).append(row)

    def group(self, name: str) -> str:
        """What an image is divided among: its class; none with a table."""
        return self.rows[name][0]["name"] if self.columns is None else ""

    def tells(self, name: str) -> bool:
        """Whether an image has a caption: a class or name, or one of the table."""
        if self.columns is None:
            return True
        return any(columns.captions(row, self.columns) for row in self.rows[name])


def _content(folder: Path, name: str) -> str:
    """sha256 of an image file; its name where it is missing, which reading names as a defect."""
    try:
        return hashlib.sha256(read_image(find_image(folder, name))).hexdigest()
    except Defect:
        return name


@cache
def _listing(path: Path, image: str | None, text: str | None, question: str | None) -> Listing:
    if path.is_file() and path.suffix.lower() in TABLES:
        return _from_tables(Listing(path.parent, _files(path.parent)), [path.name], image, text, question)
    if not path.is_dir():
        raise DataError(f"source.path={path}: no such folder or table ({', '.join(TABLES)})")
    listing = Listing(path, _files(path))
    tables = [name for name in listing.files if Path(name).suffix.lower() in TABLES]
    named = [name for name in tables if Path(name).stem.lower() == "metadata"]
    if tables := named or tables:
        if len(tables) > 1 and None in [_split_of(name) for name in tables]:
            known = ", ".join(tables[:5])
            raise DataError(f"{path} holds {len(tables)} tables ({known}); choose one: source.path={path}/{tables[0]}")
        return _from_tables(listing, tables, image, text, question)
    images = [name for name in listing.files if Path(name).suffix.lower() in SUFFIXES]
    if not images:
        kinds = sorted({Path(name).suffix or "no suffix" for name in listing.files})
        raise DataError(
            f"{path} holds no image ({', '.join(SUFFIXES)}) and no table ({', '.join(TABLES)}), "
            f"but {len(listing.files)} files of {', '.join(kinds[:8]) or 'nothing'}"
        )
    for name in images:
        parts = [part for part in Path(name).parts[:-1] if part.lower() not in SPLITS]
        said = _readable(parts[-1] if parts else Path(name).stem)
        listing.add(name, {"name": said}, _split_of(name, folders_only=True))
    return listing


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder but hidden ones, sorted."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(str(name) for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.parts))


def _split_of(name: str, folders_only: bool = False) -> str | None:
    """The split that a folder of a path is named by, or (for tables) the file."""
    path = Path(name)
    words = [*path.parts[:-1], *([] if folders_only else [path.stem])]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)


def _readable(name: str) -> str:
    """A folder's or file's name as words: `red_circle-01` is "red circle"."""
    words = re.sub(r"[\s_.-]+", " ", name).strip()
    plain = re.sub(r"(?: ?\(?\d+\)?)+$", "", words).strip()
    return plain or words


def _from_tables(
    listing: Listing, tables: list[str], image: str | None, text: str | None, question: str | None
) -> Listing:
    for table in tables:
        file = listing.folder / table
        rows = _rows(file)
        names = list(dict.fromkeys(name for row in rows for name in row))
        found = columns.find(names, image, text, question, str(file))
        if listing.columns is not None and found != listing.columns:
            raise DataError(f"{file} has other columns than {tables[0]}: {found.used}, {listing.columns.used}")
        listing.columns = found
        if found.image is None:
            raise DataError(f"{file}: this source is of images; say which column names them with source.image=COLUMN")
        for number, row in enumerate(rows):
            where = row.get(found.image)
            if not isinstance(where, str) or not where:
                raise DataError(f"{file}: row {number + 1} names no image in column {found.image}")
            split = _split_of(table)
            if split is None and isinstance(row.get("split"), str):
                split = SPLITS.get(row["split"].lower())
            name = str(Path(table).parent / where) if not Path(where).is_absolute() else where
            listing.add(name, {name: row.get(name) for name in found.used}, split)
    return listing


def _rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a table.

    Raises:
        DataError: it is empty or not UTF-8, or a row has more cells than the head.
    """
    if file.suffix.lower() in (".jsonl", ".json"):
        ends = json_stream.boundaries(file, 1 << 30)
        return list(json_stream.read(file, ends[0], ends[-1]))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from error
    head = text.split("\n", 1)[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    rows = list(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter))
    if not rows:
        raise DataError(f"{file} holds no row below its head")
    if wrong := next((number for number, row in enumerate(rows, 1) if None in row), None):
        raise DataError(f"{file}: row {wrong} has more cells than the head; put texts with {delimiter!r} in quotes")
    return rows
