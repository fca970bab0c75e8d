"""Perceptual weights: the generator's output, per sample, and what can be done with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.generator.placement import Placement, Site, decoder_layers
from model.ops import NO_SAMPLE, Rows, Segments
from model.ops.inference import Joined, join


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

    @cached_property
    def by_layer(self) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
        """The factors of every placed decoder layer by type."""
        found: dict[int, dict[str, tuple[Tensor, Tensor]]] = {layer: {} for layer in self.placement.layers}
        for site in self.placement.sites:
            found[site.layer][site.type] = (self.a[site], self.b[site])
        return found

    def joined(self, layer: int, together: tuple[tuple[str, ...], ...]) -> dict[tuple[str, ...], Joined]:
        """The factors of one layer for the op without gradients, made once.

        Args:
            layer: Its number.
            together: Types that share their input.

        Returns:
            Those of each entry of `together` that has any here, all of its types that are placed.
        """
        key = (layer, together)
        if key not in self._joined:
            placed, made = self.by_layer[layer], {}
            for types in together:
                factors = [placed[t] for t in types if t in placed]
                a, b = [a for a, _ in factors], [b for _, b in factors]
                if factors and (found := join(a, b, self.scale, self.rows)) is not None:
                    made[types] = found
            self._joined[key] = made
        return self._joined[key]

    @cached_property
    def _joined(self) -> dict[Any, dict[tuple[str, ...], Joined]]:
        return {}

    @property
    def nbytes(self) -> int:
        """Of the generated factors; the learned ones are the model's."""
        return sum(a.nbytes for a in self.a.values())

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

    def products(self) -> Tensor:
        """Inner products <dW_i, dW_j> of the samples' updates over all sites, fp32 [S, S]."""
        total = torch.zeros(self.n_samples, self.n_samples, device=next(iter(self.a.values())).device)
        for site, a in self.a.items():
            b, flat = self.b[site].float(), a.float()
            total += (flat @ (b @ b.T)).flatten(1) @ flat.flatten(1).T
        return self.scale**2 * total

    def __add__(self, other: PerceptualWeights) -> PerceptualWeights:
        """Add up the generated factors: the weights of the union of two sets of images (B is shared).

        Raises:
            ValueError: weights of another model.
        """
        self._require_same_model(other)
        return replace(self, a={site: a + other.a[site] for site, a in self.a.items()})

    def __mul__(self, factor: float) -> PerceptualWeights:
        """The same update, so many times as strong."""
        return replace(self, a={site: a * factor for site, a in self.a.items()})

    __rmul__ = __mul__

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PerceptualWeights:
        """Copy the factors to a device, and to `dtype` if given."""
        a, b = ({site: x.to(device, dtype) for site, x in factors.items()} for factors in (self.a, self.b))
        return replace(self, a=a, b=b)

    @classmethod
    def batch(cls, each: Sequence[PerceptualWeights | None]) -> PerceptualWeights:
        """Weights for as many rows, each with one sample's or none.

        Raises:
            ValueError: no row has any, an entry of several samples, or weights of different models.
        """
        given = [weights for weights in each if weights is not None]
        if not given or any(weights.n_samples != 1 for weights in given):
            raise ValueError("give one set of weights per row, or None, and at least one that is not None")
        first = given[0]
        for weights in given[1:]:
            first._require_same_model(weights)
        a = {site: torch.cat([weights.a[site] for weights in given]) for site in first.a}
        number = iter(range(len(given)))
        rows = [NO_SAMPLE if weights is None else next(number) for weights in each]
        return replace(first, a=a, rows=Rows.padded(rows, len(given)))

    def repeat_rows(self, count: int, times: int) -> PerceptualWeights:
        """For rows of which each of `count` became `times` neighbours (beams).

        Raises:
            ValueError: rows that are laid out already.
        """
        if isinstance(self.rows, Segments):
            raise ValueError("rows that are laid out as segments cannot be repeated")
        if self.rows is None and self.n_samples == 1:
            return self
        sample = range(count) if self.rows is None else self.rows.sample
        return self.for_rows(Rows.padded([s for s in sample for _ in range(times)], self.n_samples))

    def save(self, file: Path | str) -> None:
        """Write a safetensors file that `load` reads: factors A and B in their own dtype, rows left out."""
        tensors = {f"{name}.{site.name}": x for name, f in (("a", self.a), ("b", self.b)) for site, x in f.items()}
        placed = {
            "layers": self.placement.layers,
            "types": self.placement.types,
            "sites": [asdict(site) for site in self.placement.sites],
        }
        metadata = {"format": "pt", "scale": repr(self.scale), "placement": json.dumps(placed)}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata=metadata)

    @classmethod
    def load(cls, file: Path | str, device: str = "cpu") -> PerceptualWeights:
        """What `save` wrote.

        Raises:
            ValueError: another kind of file.
        """
        with safe_open(file, framework="pt", device=device) as stream:
            facts = stream.metadata() or {}
            if "placement" not in facts:
                raise ValueError(f"{file} holds no perceptual weights")
            placed = json.loads(facts["placement"])
            sites = tuple(Site(**site) for site in placed["sites"])
            a, b = ({site: stream.get_tensor(f"{name}.{site.name}") for site in sites} for name in ("a", "b"))
        return cls(Placement(tuple(placed["layers"]), tuple(placed["types"]), sites), a, b, float(facts["scale"]))

    def _require_same_model(self, other: PerceptualWeights) -> None:
        same = self.placement == other.placement and self.scale == other.scale
        if not same or not all(self.b[s] is other.b[s] or torch.equal(self.b[s], other.b[s]) for s in self.b):
            raise ValueError("these weights were made by different models; only those of one model can be combined")

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
    """Frobenius norm |W| of the projection at each site, for |dW| / |W|.

    For `m` it is that of what writes to the hidden states in the MLP: the down projection; with experts, their root
    mean square.

    Args:
        llm: Placed in by `placement`.
        whole: Context in which a weight that an engine has partitioned is whole.
    """
    layers = decoder_layers(llm)
    out = {}
    for site in placement.sites:
        module = layers[site.layer].get_submodule(site.module)
        square = 0.0
        for weight, share in _writing(module, site.d_out) if site.type == "m" else [(module.weight, 1.0)]:
            with whole(weight):
                square += share * weight.detach().float().square().sum().item()
        out[site] = square**0.5
    return out


def _writing(mlp: nn.Module, width: int) -> list[tuple[Tensor, float]]:
    """The matrices in an MLP, whatever they are called, that end at the hidden states, and the share of each."""

    def shape(weight: Tensor) -> torch.Size:
        return getattr(weight, "ds_shape", weight.shape)  # of a partitioned weight: DeepSpeed's

    found = []
    for module in mlp.modules():
        experts = [p for p in module.parameters(recurse=False) if len(shape(p)) == 3]
        if experts:  # [experts, ., .], as transformers keeps them: gate and up, then down
            found.append((experts[-1], 1 / shape(experts[-1])[0]))
        elif isinstance(module, nn.Linear) and module.out_features == width:
            found.append((module.weight, 1.0))
    return found or [(p, 1.0) for p in mlp.parameters() if len(shape(p)) > 1]
