"""The printed table of what is trained, what is frozen and where deltas go."""

from __future__ import annotations

from model.vlm import VisionLanguageModel
from train.engine.engine import part_of


def describe(model: VisionLanguageModel) -> str:
    """Parameters per part, trained and frozen, and the placement of the deltas, as text.

    Partitioned parameters count in full. A tied parameter counts once.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = counts.setdefault(part_of(name), [0, 0])
        row[not parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    lines = [f"{'part':<16}{'trained':>16}{'frozen':>16}"]
    lines += [f"{part:<16}{trained:>16,}{frozen:>16,}" for part, (trained, frozen) in counts.items()]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(f"{'total':<16}{total[0]:>16,}{total[1]:>16,}")
    return "\n".join([*lines, *model.connector.describe()])


def parameter_counts(model: VisionLanguageModel) -> dict[str, int]:
    """Parameters per part, and `total` and `trained`."""
    counts: dict[str, int] = {"total": 0, "trained": 0}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part_of(name)] = counts.get(part_of(name), 0) + size
        counts["total"] += size
        counts["trained"] += size * parameter.requires_grad
    return counts
