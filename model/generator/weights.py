"""Perceptual weights: the generator's output, per sample, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.generator.placement import Placement, Site, decoder_layers
from model.ops import Rows, Segments


@dataclass(frozen=True)
class PerceptualWeights:
    """Low-rank deltas dW = scale * (A B)^T for every sample and site (paper, Figure 3b).

    Attributes:
        placement: Where they belong.
        a: Per site, the generated factor [S, d_in, r].
        b: Per site, the learned factor [r, d_out], the same for all samples.
        scale: Alpha / r.
        rows: The sample of each text row; None: row i is sample i, and a single sample serves every row. `Segments`:
            the rows of one input, laid out (what a compiled layer needs).
    """

    placement: Placement
    a: dict[Site, Tensor]
    b: dict[Site, Tensor]
    scale: float
    rows: Rows | Segments | None = None

    @property
    def n_samples(self) -> int:
        """S."""
        return next(iter(self.a.values())).shape[0]

    def for_layer(self, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of one decoder layer by type."""
        return {site.type: (self.a[site], self.b[site]) for site in self.placement.sites if site.layer == layer}

    def for_rows(self, rows: Rows | Segments | None) -> PerceptualWeights:
        """The same weights for other text rows."""
        return replace(self, rows=rows)

    def select(self, samples: Tensor) -> PerceptualWeights:
        """The weights of some samples, int64 indices, without rows."""
        return replace(self, a={site: a[samples] for site, a in self.a.items()}, rows=None)

    def of_types(self, types: Sequence[str]) -> PerceptualWeights:
        """Only the deltas of some types."""
        placement = self.placement.only(types)
        a, b = ({site: factors[site] for site in placement.sites} for factors in (self.a, self.b))
        return replace(self, placement=placement, a=a, b=b)

    def delta(self, site: Site, sample: int) -> Tensor:
        """dW [d_out, d_in] of one sample, in fp32, in the layout of `nn.Linear.weight`."""
        return self.scale * (self.a[site][sample].float() @ self.b[site].float()).T

    def __add__(self, other: PerceptualWeights) -> PerceptualWeights:
        """Add up the generated factors: the weights of the union of two sets of images (B is shared)."""
        return replace(self, a={site: a + other.a[site] for site, a in self.a.items()})

    def image_share(self) -> Tensor:
        """Share of A's energy that varies with the image, between 0 and 1; fp32 scalar.

        Var over samples / mean square, taken over all sites. A value near 0 means that every image gets the same
        weights: the generator has turned into a plain LoRA and sees nothing. One sample alone gives 0.
        """
        varying = total = torch.zeros((), device=next(iter(self.a.values())).device)
        for a in self.a.values():
            a = a.detach().float()
            varying = varying + a.var(0, correction=0).sum()
            total = total + a.square().mean(0).sum()
        return varying / total.clamp_min(1e-30)

    def norms(self) -> dict[Site, Tensor]:
        """Frobenius norm of dW per site, mean over samples; fp32 scalars.

        |A B|^2 = tr((A^T A)(B B^T)): r x r products only, dW itself is never formed.
        """
        out = {}
        for site, a in self.a.items():
            a, b = a.detach().float(), self.b[site].detach().float()
            gram = torch.einsum("sdr,sdq->srq", a, a)
            out[site] = self.scale * torch.einsum("srq,rq->s", gram, b @ b.T).clamp_min(0).sqrt().mean()
        return out


def base_norms(
    llm: nn.Module, placement: Placement, whole: Callable[[Tensor], AbstractContextManager] = nullcontext
) -> dict[Site, float]:
    """Frobenius norm |W| of the projection at each site, for |dW| / |W|; for `m`, that of the down projection.

    Args:
        whole: Context in which a weight that an engine has partitioned is whole.
    """
    layers = decoder_layers(llm)
    out = {}
    for site in placement.sites:
        module = layers[site.layer].get_submodule(site.module)
        if site.type == "m":
            module = next(m for n, m in module.named_modules() if n in ("down_proj", "fc2"))
        with whole(module.weight):
            out[site] = module.weight.detach().float().norm().item()
    return out
