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
    if model.placement is not None:
        rank = model.connector.generator.config.rank
        layers = ", ".join(map(str, model.placement.layers))
        lines.append(f"deltas of rank {rank} in layers {layers} (0-based):")
        for weight_type in model.placement.types:
            site = model.placement.of_type(weight_type)[0]
            lines.append(f"  {weight_type:<5}{site.module:<20}{site.d_in:>6} -> {site.d_out}")
    else:
        lines.append(f"{model.connector.visual_tokens} visual tokens per image in the LLM's input")
    return "\n".join(lines)


def parameter_counts(model: VisionLanguageModel) -> dict[str, int]:
    """Parameters per part, and `total` and `trained`."""
    counts: dict[str, int] = {"total": 0, "trained": 0}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part_of(name)] = counts.get(part_of(name), 0) + size
        counts["total"] += size
        counts["trained"] += size * parameter.requires_grad
    return counts
