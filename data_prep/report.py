"""`python -m data_prep.report SPLIT_FOLDER ...`: a prepared split's manifest as `report.md` with plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from common.arguments import Parser
from common.files import write_atomically
from data_prep.store.manifest import Manifest, read_manifest

REPORT, PLOTS = "report.md", "report.png"
_HISTOGRAMS = {
    "dialogue tokens": "tokens of a dialogue",
    "dialogue characters": "characters of a dialogue",
    "image shortest side": "shorter side of an image, pixels",
    "image kilobytes": "size of an image file, kB",
    "dialogues per sample": "dialogues of a sample",
}
"""Statistics whose values are lower bounds of bins, and their axes."""


def write(folder: Path) -> Path:
    """Write the report of a prepared split beside its manifest.

    Raises:
        DataError: no manifest.
    """
    manifest = read_manifest(folder)
    _plot(manifest, folder / PLOTS)
    write_atomically(folder / REPORT, render(manifest))
    return folder / REPORT


def is_current(folder: Path) -> bool:
    """Whether report and plots are there, whole, and those of the manifest.

    Raises:
        DataError: no manifest.
    """
    manifest = read_manifest(folder)
    try:
        with Image.open(folder / PLOTS) as plots:
            plots.verify()  # the checksums of its chunks
        return (folder / REPORT).read_text(encoding="utf-8") == render(manifest)
    except (OSError, SyntaxError, ValueError):
        return False


def to_look_at(manifest: Manifest) -> list[str]:
    """What is no defect and may still surprise, a sentence each."""
    found = []
    if count := manifest.statistics.get("image alpha", {}).get("transparent"):
        found.append(f"{count:,} images have transparent pixels, which show white (vision.transparent)")
    for column in manifest.statistics.get("captions left out", {}):
        found.append(
            f"column {column} was left out, since there are questions; for pretraining prepare its captions too: "
            f"the same command with name={manifest.dataset}_captions source.text={column}"
        )
    tokens = manifest.statistics.get("tokens", {})
    if count := tokens.get("unknown"):
        share = _percent(count, tokens["supervised"])
        found.append(f"{count:,} of the tokens to learn ({share}) cannot be spelled by the tokenizer (data.on_unknown)")
    return found


def render(manifest: Manifest) -> str:
    """The report as Markdown."""
    dropped = sum(manifest.dropped.values())
    copies = manifest.images - manifest.unique_images
    size = sum(shard["bytes"] for shard in manifest.shards)
    facts = {
        "samples": f"{manifest.samples:,}",
        "of them text-only": f"{manifest.text_only:,}",
        "dialogues": f"{manifest.dialogues:,}",
        "images": f"{manifest.images:,}",
        "of them copies of another": f"{copies:,} ({_percent(copies, manifest.images)})",
        "left out for a defect": f"{dropped:,} ({_percent(dropped, dropped + manifest.samples)})",
        "shards": f"{len(manifest.shards):,}, {size / 1e9:.3g} GB",
        "fingerprint": f"`{manifest.fingerprint}`",
    }
    if tokens := manifest.statistics.get("tokens"):
        facts["tokens"] = f"{tokens['all']:,}"
        facts["of them supervised"] = f"{tokens['supervised']:,} ({_percent(tokens['supervised'], tokens['all'])})"
    if lengths := manifest.statistics.get("dialogue tokens"):
        marks = ", ".join(f"{share:.0%} below {_quantile(lengths, share):,}" for share in (0.5, 0.9, 0.99, 1.0))
        facts["tokens of a dialogue"] = marks
    lines = [f"# {manifest.dataset}/{manifest.split}", "", *_table(("", ""), facts.items())]
    if notes := to_look_at(manifest):
        lines += ["", "## To look at", "", *(f"- {note}" for note in notes)]
    lines += ["", f"![histograms]({PLOTS})", "", "## Sources", ""]
    lines += _table(("source", "samples"), ((name, f"{count:,}") for name, count in manifest.sources.items()))
    if manifest.dropped:
        lines += ["", "## Left out", "", *_table(("reason", "records", "first example"), _reasons(manifest))]
    rest = {name: counts for name, counts in manifest.statistics.items() if name not in (*_HISTOGRAMS, "tokens")}
    lines += ["", "## Counted", ""]
    rows = ((name, value, f"{count:,}") for name, counts in rest.items() for value, count in counts.items())
    lines += _table(("what", "value", "number"), rows)
    return "\n".join(lines) + "\n"


def _reasons(manifest: Manifest) -> list[tuple[str, str, str]]:
    first: dict[str, str] = {}
    for example in manifest.dropped_examples:
        first.setdefault(example["reason"], f"`{example['id']}` {example['detail']}".strip())
    by_count = sorted(manifest.dropped.items(), key=lambda item: -item[1])
    return [(reason, f"{count:,}", first.get(reason, "")) for reason, count in by_count]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table; what the data say is escaped, since it may be anything."""
    cells = [[_escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _escape(text: str) -> str:
    flat = "".join(letter if letter.isprintable() else " " for letter in text)[:200]
    return flat.replace("|", "\\|").replace("<", "&lt;")


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.2%}"


def _quantile(counts: dict[str, int], share: float) -> int:
    """Upper edge of the bin that the quantile lies in."""
    bins = sorted((int(low), count) for low, count in counts.items())
    need, seen = share * sum(count for _, count in bins), 0
    for number, (low, count) in enumerate(bins):
        seen += count
        if seen >= need:
            return bins[number + 1][0] if number + 1 < len(bins) else low * 2
    return bins[-1][0] * 2


def _plot(manifest: Manifest, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in _HISTOGRAMS if manifest.statistics.get(name)]
    figure = Figure(figsize=(4 * max(1, len(shown)), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(shown):
        bins = sorted((int(low), count) for low, count in manifest.statistics[name].items())
        axes = figure.add_subplot(1, len(shown), number + 1)
        axes.bar(range(len(bins)), [count for _, count in bins], width=0.9, color="tab:blue")
        step = -(-len(bins) // 6)
        axes.set_xticks(range(0, len(bins), step), [f"{low:,}" for low, _ in bins[::step]], fontsize=7)
        axes.set_xlabel(f"{_HISTOGRAMS[name]} (from)", fontsize=8)
        axes.set_ylabel("number", fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
    figure.savefig(file, dpi=110)


def main() -> int:
    """Write reports again."""
    parser = Parser(prog="python -m data_prep.report", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="SPLIT_FOLDER")
    for folder in parser.parse_args().folders:
        print(write(folder))
    return 0


if __name__ == "__main__":
    from common.errors import run_cli

    run_cli(main)
