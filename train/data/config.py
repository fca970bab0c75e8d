"""Configuration of the data of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError
from common.settings import setting
from data_prep.store.manifest import MANIFEST
from data_prep.text.templates import NAMES

GROUPINGS = ("none", "length", "length_modality")


@dataclass
class SourceConfig:
    """One prepared split to train on.

    Attributes:
        path: Folder of the split, below `data.root` unless absolute.
        weight: Passes over it per epoch; 0.5 takes another half of it each epoch, 2 all of it twice.
    """

    path: str = setting("???", path=True)
    weight: float = setting(1.0, within="(0, 1e4]")


@dataclass
class DataConfig:
    """Which data, as which text, in which batches.

    Attributes:
        root: Folder of prepared data.
        name: A prepared data set, whose splits take the place of a recipe's `train`, `val` and `test` (`use_named`);
            null: these. On the command line it is one or the other.
        train: Sources of the training mixture.
        val, test: Folders of the splits to evaluate on, below `root` unless absolute.
        expected_length: Tokens of the longest row, to plan memory with (`check=true`) where data or tokenizer are not
            on this machine; null: they have to be.
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
        compat: `official`: text, image slot and positions as the released VLoRA has them, templates `plain` and
            `vicuna_v1` (docs/paper.md), for figures comparable to the published ones; `none`.
        max_length: Longest row in tokens; null: any.
        on_too_long: `fail`, or `drop` the dialogue (counted and reported).
        on_unknown: `fail` when the tokenizer cannot spell more than 1 % of the answers' tokens, or `warn`.
        on_corrupt_shard: `fail` when a shard to train on turns out unreadable, or `drop` all its samples (reported
            once); evaluation always fails.
        pad_to_multiple: Row length is padded to a multiple of this.
        num_workers: Loader processes per rank; 0 loads in the training process; null: 4 with a GPU, else 0
            (docs/loader.md: what they cost).
        prefetch: Steps that each loader process prepares ahead; a rank holds at most `num_workers * prefetch` of them
            in shared memory.
    """

    root: str = setting(".cache/data", path=True)
    train: list[SourceConfig] = field(default_factory=list)
    val: str | None = setting(None, path=True)
    test: str | None = setting(None, path=True)
    name: str | None = setting(None)
    expected_length: int | None = setting(None, within="[1, 1e7]")
    batch_size: int = setting(32, within="[1, 1e7]")
    group_by: str = setting("none", choices=GROUPINGS)
    group_window: int = setting(16, within="[1, 1e6]")
    tokens_per_micro_batch: int | None = setting(None, within="[1, 1e9]")
    dialogues_per_sample: int | None = setting(None, within="[1, 1e6]")
    template: str = setting("chat", choices=NAMES)
    caption_template: str | None = setting(None, choices=NAMES)
    compat: str = setting("none", choices=("none", "official"))
    max_length: int | None = setting(2048, within="[1, 1e7]")
    on_too_long: str = setting("fail", choices=("fail", "drop"))
    on_unknown: str = setting("fail", choices=("fail", "warn"))
    on_corrupt_shard: str = setting("fail", choices=("fail", "drop"))
    pad_to_multiple: int = setting(1, within="[1, 65536]")
    num_workers: int | None = setting(None, within="[0, 256]")
    prefetch: int = setting(2, within="[1, 1000]")

    def use_named(self, stage: str) -> None:
        """Put the splits of `name` in the place of `train`, `val` and `test`, and null in that of `name`.

        Pretraining takes `caption_train` and `caption_val` where the data set has them; else, and for finetuning, it is
        `train` and `val`. `test` is `test`. A split that is not there is null.

        Args:
            stage: `pretrain` or `finetune`.

        Raises:
            ConfigError: no such data set, or nothing in it to train on.
        """
        if self.name is None:
            return
        folder = Path(self.root) / self.name
        found = {file.parent.name for file in folder.glob(f"*/{MANIFEST}")}
        first = "caption_" if stage == "pretrain" and "caption_train" in found else ""
        if f"{first}train" not in found:
            others = sorted({file.parents[1].name for file in Path(self.root).glob(f"*/*/{MANIFEST}")})
            what = f"{folder} has no split train, only {', '.join(sorted(found))}" if found else f"no data set {folder}"
            raise ConfigError(
                f"data.name={self.name}: {what}; there are {', '.join(others) or 'none'}. Make it with "
                f"python -m data_prep source=folder source.path=FOLDER name={self.name} (docs/data.md)"
            )
        self.train = [SourceConfig(f"{self.name}/{first}train")]
        self.val = f"{self.name}/{first}val" if f"{first}val" in found else None
        self.test = f"{self.name}/test" if "test" in found else None
        self.name = None

    def check(self, prefix: str) -> None:
        """Something to train on.

        Raises:
            ConfigError: no source.
        """
        if not self.train and self.name is None:
            raise ConfigError(f"{prefix}train is empty: name at least one prepared split")
