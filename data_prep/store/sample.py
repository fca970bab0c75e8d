"""The one sample schema, its shards on disk, and the manifest that describes a prepared split.

A *sample* is one set of images with one or more independent dialogues about it:

    {id: str, images: [bytes], conversations: [[{role, content}, ...], ...], source: str,
     references: [{kind, answers, match}, ...]}

An image with ten questions is therefore stored, encoded and turned into weights once. A caption is a dialogue whose
user turn is empty; a text-only sample has no images. Images are the source's own bytes, never re-encoded. `references`
says how the answer of each dialogue is scored, and is empty where the source says nothing about that.

A prepared split is a folder `<root>/<dataset>/<split>` with, per shard,

    shard-00000.arrow   the samples: an Arrow IPC file, uncompressed, so that any sample is one memory-mapped look-up
                        (`datasets.load_dataset("arrow", data_files=...)` reads it as well)
    shard-00000.npy     per sample: images, dialogues and characters (`INDEX`), what a sampler sorts by
    shard-00000.hashes.npy   the first 8 bytes of every image's sha256, to count duplicates
    shard-00000.json    receipt: counts, sha256, what was dropped; written last, so a shard with a receipt is whole

and, once all shards are there, `index.npy` (the shards' in one, for all ranks of a machine to map) and
`manifest.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 1
ROLES = ("system", "user", "assistant")
ROWS_PER_BATCH = 64
"""Samples per Arrow record batch: position `i` is row `i % 64` of batch `i // 64`."""
_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_REFERENCE = pa.struct([("kind", pa.string()), ("answers", pa.list_(pa.string())), ("match", pa.string())])
ARROW = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("conversations", pa.list_(pa.list_(_TURN))),
        ("source", pa.string()),
        ("references", pa.list_(_REFERENCE)),
    ]
)
WITHOUT_REFERENCES = ARROW.remove(ARROW.get_field_index("references"))
"""Schema of the shards that were prepared before there were references; they are read as well."""
INDEX = np.dtype([("images", "<u2"), ("dialogues", "<u2"), ("characters", "<u4")])
INDEX_FILE = "index.npy"
MAX_EXAMPLES = 10
Turn = dict[str, str]
Dialogue = list[Turn]
MATCHES = ("exact", "vqa", "number", "choice", "contains")
"""How an answer is compared (`train.measure.scoring`)."""


class Reference(TypedDict):
    """How the answer of a dialogue is scored.

    Attributes:
        kind: Kind of the question, for accuracy by kind; empty: by the answer.
        answers: All accepted answers; empty: the dialogue's own alone.
        match: One of `MATCHES`.
    """

    kind: str
    answers: list[str]
    match: str


@dataclass
class Sample:
    """One set of images and the dialogues about it; see the module's docstring.

    Attributes:
        id: Unique in its dataset.
        images: Encoded image files, possibly none.
        conversations: Dialogues, each a list of `{"role": ..., "content": ...}`.
        source: Where it comes from, e.g. the dataset's name or a part of it.
        references: How the answers are scored, one per dialogue, or none.
    """

    id: str
    images: list[bytes]
    conversations: list[Dialogue]
    source: str
    references: list[Reference] = field(default_factory=list)


@dataclass
class Dropped:
    """A record of the source that did not become a sample.

    Attributes:
        id: Of the record, as good as the source names it.
        reason: Short and countable, e.g. `image missing`.
        detail: What exactly, e.g. the file.
    """

    id: str
    reason: str
    detail: str = ""


@dataclass
class Count:
    """Something in the source that is neither a sample nor a defect, and still belongs into the manifest's statistics.

    Attributes:
        name: Of the statistic, e.g. `not fetched`.
        value: What was met, e.g. `HTTP Error 404`.
        number: How often.
    """

    name: str
    value: str
    number: int = 1


def shard_stem(number: int) -> str:
    """File name of a shard without its suffix."""
    return f"shard-{number:05d}"
