"""Figure 4: the paper's accounting meets its printed curves; ours meets figures worked out by hand."""

import csv

import pytest

from train import flops

# Ratios read off the printed figure, by text and visual tokens (+-0.001; at 64 tokens +-0.01).
PRINTED = {
    32: {320: 0.165, 576: 0.105, 832: 0.081, 1088: 0.069, 1600: 0.057, 2112: 0.052, 2624: 0.050},
    128: {320: 0.368, 576: 0.241, 832: 0.183, 1088: 0.149, 1600: 0.113, 2112: 0.094, 2624: 0.084},
    256: {320: 0.533, 576: 0.373, 832: 0.289, 1088: 0.237, 1600: 0.178, 2112: 0.145, 2624: 0.125},
}


def test_the_papers_accounting_meets_the_printed_figure():
    for text, ratios in PRINTED.items():
        for visual, ratio in ratios.items():
            llava, vlora = flops.paper(text, visual)
            assert vlora / llava == pytest.approx(ratio, abs=0.002), (text, visual)
    for text, ratio in ((32, 0.555), (128, 0.84), (256, 0.953)):
        llava, vlora = flops.paper(text, 64)
        assert vlora / llava == pytest.approx(ratio, abs=0.01)
    ends = {text: flops.paper(text, 2624) for text in flops.TEXT}
    for text, (llava, vlora) in {32: (37916, 1900), 128: (39466, 3300), 256: (41414, 5180)}.items():
        assert ends[text][0] == pytest.approx(llava, rel=0.002) and ends[text][1] == pytest.approx(vlora, rel=0.02)


@pytest.mark.slow
def test_ours_is_counted_from_the_modules_and_the_figure_is_written(tmp_path, monkeypatch):
    """By hand, GFLOPs without the encoder: LLaVA 8,093 and VLoRA 455 at (32, 576), ratios .182 and .305 at 128, 256."""
    monkeypatch.setattr(flops, "VISUAL", (576,))
    found = flops.points()
    by = {(p.accounting, p.encoder, p.text): p for p in found}
    assert by["branch", False, 32].llava == pytest.approx(8093, rel=0.002)
    assert by["branch", False, 32].vlora == pytest.approx(455, rel=0.002)
    for text, (plain, encoder) in {32: (0.056, 0.099), 128: (0.182, 0.214), 256: (0.305, 0.328)}.items():
        assert by["branch", False, text].ratio == pytest.approx(plain, abs=0.0015)
        assert by["branch", True, text].ratio == pytest.approx(encoder, abs=0.0015)
        assert by["branch", False, text].vlora < by["merged", False, text].vlora
    flops.write_csv(found, tmp_path / "figure4.csv")
    flops.draw(found, tmp_path / "figure4.png")
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    assert len(rows) == len(found) == 15 and float(rows[0]["ratio"]) == pytest.approx(found[0].ratio, abs=1e-4)
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
