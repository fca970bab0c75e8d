"""Whether the tokenizer can spell the answers that a stage is to learn."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.store.errors import CorruptShardError, DataError
from data_prep.store.sample import Dialogue
from data_prep.store.split import Split
from data_prep.text.dialogues import placed_images
from model.batch import IGNORE
from train.data.collate import Text

_DIALOGUES = 512
"""Read of a split, spread evenly over it."""
_ACCEPTED = 0.01
"""Share of unknown target tokens."""


def unknown_targets(split: Split, text: Text) -> str | None:
    """What to say of a split with answers that the tokenizer cannot spell; None where that is 1 % or less of them.

    A model trained on the unknown token learns to answer with it, at a healthy loss.
    """
    if text.dialogue.unknown_id is None:
        return None
    unknown, targets, words = 0, 0, dict[str, None]()
    for dialogue in _spread(split):
        encoder = text.encoder(dialogue)
        try:
            labels = [label for label in encoder.encode(dialogue, placed_images(dialogue)).labels if label != IGNORE]
        except DataError:  # reported where it is trained on
            continue
        targets += len(labels)
        if encoder.unknown_id in labels:
            unknown += sum(label == encoder.unknown_id for label in labels)
            words |= dict.fromkeys(encoder.unknown_words(dialogue))
    if unknown <= _ACCEPTED * targets:
        return None
    return (
        f"{split.folder}: the tokenizer cannot spell {unknown / targets:.1%} of the answers' tokens (such as "
        f"{', '.join(map(repr, list(words)[:5]))}), and the model would learn to answer with its unknown token"
    )


def _spread(split: Split) -> Iterator[Dialogue]:
    count = min(_DIALOGUES, len(split))
    for number in range(count):
        try:
            sample = split[number * len(split) // count]
        except CorruptShardError:  # reported where it is trained on
            continue
        yield sample.conversations[number % len(sample.conversations)]
