"""`python -m train.flops [out=DIR]`: the paper's Figure 4, GFLOPs of a prompt against its visual tokens.

Three accountings of VLoRA-7B beside LLaVA-7B, 2 FLOPs per multiply-add, for 32, 128 and 256 text tokens:

    paper     the formula behind the printed figure, recovered from it: plain 4h feed-forward, no vocabulary head, the
              generator as a full transformer over patches and queries, W_v W_s formed for q, k, v, o, W_1 and W_2
    branch    counted from our modules: the prompt, the generator, and the low-rank branch of every text token
    merged    the same with the deltas of q, k, v, o folded into the weights once per image; `m` stays a branch

The last two with the vision encoder (on both sides) and without. Writes figure4.csv and figure4.png.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import run_cli
from common.options import parse_options
from common.settings import setting
from model.connectors import VLoRAConnector, connector_class
from model.vlm import VisionLanguageModel, build_model
from train.config import compose_overrides, resolve
from train.measure.flops import FlopCounter, vision_flops

TEXT = (32, 128, 256)
VISUAL = tuple(range(64, 2625, 256))
ACCOUNTINGS = ("paper", "branch", "merged")


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        out: Folder of the figure.
    """

    out: str = setting("outputs/figure4", path=True)


@dataclass(frozen=True)
class Point:
    """One prompt: GFLOPs of both systems in one accounting."""

    accounting: str
    encoder: bool
    text: int
    visual: int
    llava: float
    vlora: float

    @property
    def ratio(self) -> float:
        """VLoRA's share of LLaVA's."""
        return self.vlora / self.llava


def paper(text: int, visual: int) -> tuple[float, float]:
    """GFLOPs of LLaVA and VLoRA as the printed figure counts them.

    Recovered from its digitised curves (27 points, ratios within 0.0008): each term is needed for the fit. The last,
    96 h^2 per text token, has no explanation in a merged model.
    """
    h, g, layers, queries, rank = 4096, 512, 32, 8, 64

    def transformer(tokens: int, width: int, depth: int) -> float:
        return depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)

    generator = transformer(visual + queries, g, 5 * 8)
    products = 2.0 * 12 * h**2 * rank * 8
    vlora = transformer(text, h, layers) + generator + products + 96.0 * h**2 * text
    return transformer(text + visual, h, layers) / 1e9, vlora / 1e9


def counted() -> Iterator[Point]:
    """Every prompt, counted from the modules of `experiment=vlora_7b` and `llava_v15_7b`, built without weights."""
    models = {name: _meta(name) for name in ("llava_v15_7b", "vlora_7b")}
    for visual in VISUAL:
        for model, name in ((model, name) for name, model in models.items()):
            config = resolve(compose_overrides([f"experiment={name}"])).model
            with torch.device("meta"):
                model.connector = connector_class(config).build(config, model.llm, visual, 1024)
        llava, vlora = (FlopCounter(model, features_cached=True) for model in models.values())
        connector = models["vlora_7b"].connector
        assert isinstance(connector, VLoRAConnector)
        assert models["vlora_7b"].vision is not None
        seen = vision_flops(models["vlora_7b"].vision, visual)
        for text in TEXT:
            ours = {
                "branch": vlora.prompt(text),
                "merged": vlora.prompt(text) - connector.decoder_flops() * text + _merged(connector, text),
            }
            for accounting, flops in ours.items():
                for encoder in (False, True):
                    extra = seen * encoder
                    both = ((llava.prompt(text) + extra) / 1e9, (flops + extra) / 1e9)
                    yield Point(accounting, encoder, text, visual, *both)


def _meta(experiment: str) -> VisionLanguageModel:
    return build_model(resolve(compose_overrides([f"experiment={experiment}"])).model, torch.bfloat16, meta=True)


def _merged(connector: VLoRAConnector, text: int) -> float:
    """Forming each delta and adding it to its weight once; `m` has no weight to be added to."""
    rank, placement = connector.generator.config.rank, connector.placement
    assert placement is not None
    total = 0.0
    for site in placement.sites:
        if site.type == "m":
            total += 2.0 * (site.d_in + site.d_out) * rank * text
        else:
            total += 2.0 * site.d_in * site.d_out * rank + site.d_in * site.d_out
    return total


def points() -> list[Point]:
    """All points of the figure."""
    printed = [Point("paper", False, text, visual, *paper(text, visual)) for visual in VISUAL for text in TEXT]
    return printed + list(counted())


def write_csv(found: list[Point], file: Path) -> None:
    """One line per point."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["accounting", "encoder", "text_tokens", "visual_tokens", "llava_gflops", "vlora_gflops", "ratio"]
        )
        for p in found:
            numbers = (f"{p.llava:.1f}", f"{p.vlora:.1f}", f"{p.ratio:.4f}")
            writer.writerow([p.accounting, str(p.encoder).lower(), p.text, p.visual, *numbers])


def draw(found: list[Point], file: Path) -> None:
    """GFLOPs as the paper's left panel has them, and the ratio in every accounting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for color, text in zip(("tab:blue", "tab:orange", "tab:green"), TEXT, strict=True):
        printed = [p for p in found if (p.accounting, p.text) == ("paper", text)]
        across = [p.visual for p in printed]
        axes[0].plot(across, [p.llava for p in printed], color=color, label=f"LLaVA, C={text}")
        axes[0].plot(across, [p.vlora for p in printed], "--", color=color, label=f"VLoRA, C={text}")
        for axis, encoder in ((axes[1], False), (axes[2], True)):
            for accounting, style in zip(ACCOUNTINGS, ("-", "--", ":"), strict=True):
                if chosen := [p for p in found if (p.accounting, p.encoder, p.text) == (accounting, encoder, text)]:
                    label = f"{accounting}, C={text}"
                    axis.plot([p.visual for p in chosen], [p.ratio for p in chosen], style, color=color, label=label)
    titles = ("GFLOPs, paper's accounting", "VLoRA / LLaVA, without the encoder", "VLoRA / LLaVA, with the encoder")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="visual tokens of LLaVA", ylim=(0, None))
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> int:
    """Write the figure."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    found = points()
    write_csv(found, out / "figure4.csv")
    draw(found, out / "figure4.png")
    names = ("paper", "branch", "+ encoder", "merged", "+ encoder")
    print("VLoRA / LLaVA\n" + f"{'C':>4}{'L':>6}" + "".join(f"{name:>11}" for name in names))
    for text in TEXT:
        for visual in VISUAL:
            row = {(p.accounting, p.encoder): p.ratio for p in found if (p.text, p.visual) == (text, visual)}
            print(f"{text:>4}{visual:>6}" + "".join(f"{ratio:>11.3f}" for ratio in row.values()))
    print(f"{out / 'figure4.csv'}, {out / 'figure4.png'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
