"""Configuration of the data of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SourceConfig:
    """One prepared split to train on.

    Attributes:
        path: Folder of the split, below `data.root` unless absolute.
        weight: Passes over it per epoch; 0.5 takes another half of it each epoch, 2 all of it twice.
    """

    path: str = "???"
    weight: float = 1.0


@dataclass
class DataConfig:
    """Which data, as which text, in which batches.

    Attributes:
        root: Folder of prepared data.
        train: Sources of the training mixture.
        val, test: Folders of the splits to evaluate on, below `root` unless absolute.
        batch_size: Samples (image sets) of one optimizer step, over all ranks and micro-batches.
        group_by: Which samples share a step and how they are dealt to ranks and micro-batches (`Batching`): `none`,
            as the order has them; `length`; `length_modality`, samples with and without images apart.
        group_window: Steps among which samples change places for it; 1: only within a step.
        tokens_per_micro_batch: A rank's micro-batch holds at most so many tokens, visual ones of `connector=mlp` and
            `qformer` counted (more only where one sample has more), and each step has as many micro-steps as it
            needs, the same number on all ranks; null: `engine.micro_batch_size` samples.
        dialogues_per_sample: Dialogues drawn from a sample each time it comes up; null: all.
        template: Text template of dialogues, see `data_prep.text.templates`.
        caption_template: That of captions (dialogues with an empty user turn); null: `template`.
        max_length: Longest row in tokens; null: any.
        on_too_long: `fail`, or `drop` the dialogue (counted and reported).
        on_corrupt_shard: `fail` when a shard to train on turns out unreadable, or `drop` all its samples (reported
            once); evaluation always fails.
        pad_to_multiple: Row length is padded to a multiple of this.
        num_workers: Loader processes per rank; 0 loads in the training process.
        prefetch: Steps that each loader process prepares ahead; a rank holds at most `num_workers * prefetch` of them
            in shared memory.
    """

    root: str = ".cache/data"
    train: list[SourceConfig] = field(default_factory=list)
    val: str | None = None
    test: str | None = None
    batch_size: int = 32
    group_by: str = "none"
    group_window: int = 16
    tokens_per_micro_batch: int | None = None
    dialogues_per_sample: int | None = None
    template: str = "chat"
    caption_template: str | None = None
    max_length: int | None = 2048
    on_too_long: str = "fail"
    on_corrupt_shard: str = "fail"
    pad_to_multiple: int = 1
    num_workers: int = 0
    prefetch: int = 2
