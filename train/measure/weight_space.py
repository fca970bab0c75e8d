"""How images lie to each other in weight space: in how many directions the generated weights vary, and which images get
almost the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.generator.weights import PerceptualWeights
from model.vlm import VisionLanguageModel
from train.data.evaluation import EvalBatch

MOST = 64
"""Images that are compared."""


@dataclass(frozen=True)
class WeightSpace:
    """Inner products of the updates of some images.

    Attributes:
        samples: Their ids.
        products: float64 [n, n], <dW_i, dW_j> over all projections.
    """

    samples: list[str]
    products: np.ndarray

    @classmethod
    def read(cls, found: Any) -> WeightSpace | None:
        """From what `as_dict` made; None where it is nothing of the kind.

        Raises:
            ValueError, TypeError, KeyError: damaged.
        """
        if found is None:
            return None
        products = np.array(found["products"], dtype=np.float64)
        if products.shape != (len(found["samples"]),) * 2:
            raise ValueError(f"weights of {len(found['samples'])} samples with products {products.shape}")
        return cls([str(sample) for sample in found["samples"]], products)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"samples": self.samples, "products": [[float(f"{x:.6g}") for x in row] for row in self.products]}

    @property
    def centred(self) -> np.ndarray:
        """Inner products of what sets each image apart from the mean of all."""
        mean = self.products.mean(0)
        return self.products - mean - mean[:, None] + mean.mean()

    @property
    def effective_rank(self) -> float:
        """In how many directions the images differ: exp of the entropy of their variance (Roy and Vetterli 2007).

        At most n - 1. Near 1: one direction, however large, is all that an image changes.
        """
        values = np.linalg.eigvalsh(self.centred).clip(min=0)
        shares = values[values > 1e-9 * values.max(initial=0)] / max(values.sum(), 1e-300)
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    @property
    def shared(self) -> float:
        """Share of the updates' energy that all images have in common, 0 to 1."""
        energy = float(np.trace(self.products))
        return float(self.products.sum()) / len(self.samples) / energy if energy > 0 else 0.0

    def nearest(self, count: int) -> list[list[tuple[int, float]]]:
        """For each image the `count` others with the most similar weights, and the cosine of what sets both apart."""
        centred = self.centred
        norms = np.sqrt(np.diag(centred).clip(min=1e-300))
        cosines = centred / norms / norms[:, None]
        np.fill_diagonal(cosines, -np.inf)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return [[(int(other), float(cosines[n, other])) for other in row] for n, row in enumerate(order)]


@torch.no_grad()
def measure(model: VisionLanguageModel, batches: Iterable[EvalBatch], device: torch.device) -> WeightSpace | None:
    """The weights of the first images of an evaluation, at most `MOST`; None of fewer than three."""
    found: dict[str, PerceptualWeights] = {}
    for evaluation in batches:
        weights = model.condition(evaluation.batch.to(device, next(model.parameters()).dtype)).weights
        assert weights is not None
        owners = evaluation.batch.row_to_sample.tolist()
        for item, owner in zip(evaluation.items, owners, strict=False):
            if item.shown and len(found) < MOST:
                found.setdefault(item.sample, weights.select(torch.tensor([owner], device=device)))
        if len(found) == MOST:
            break
    return _of(found) if len(found) > 2 else None


def _of(weights: dict[str, PerceptualWeights]) -> WeightSpace:
    each: Sequence[PerceptualWeights] = list(weights.values())
    return WeightSpace(list(weights), PerceptualWeights.batch(each).products().cpu().double().numpy())
