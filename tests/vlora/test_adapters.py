"""Adapters as others load them: PEFT's own loader, and GGUF as llama.cpp reads it."""

from __future__ import annotations

import json
import shutil
import sys

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import report_errors
from data_prep.parts.smollm2 import _halves
from tests.vlora.conftest import make_folder, square
from train import adapter

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 180, 20)}
QUESTIONS = ["what color is the shape?", "is there a red shape?"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in COLORS.items():
        (folder / f"{name}.png").write_bytes(square(color))
    (folder / "notes.txt").write_text("no image")
    return folder


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["adapter", *map(str, arguments)])
    code = report_errors(adapter.main)
    return code, capsys.readouterr()


def branch_logits(loaded, types, *colors):
    model, processor = loaded
    pixels = processor.image_processor([square(COLORS[color]) for color in colors])["pixel_values"]
    with torch.no_grad():
        weights = model.perceive(pixels).of_types(types)
        return model(**prompts(processor), perceptual_weights=weights).logits


def prompts(processor):
    rows = [processor.text.encode_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    return processor.batch(rows, [[] for _ in rows])


def test_a_damaged_sample_of_the_run_is_named_and_a_damaged_card_changes_nothing(
    monkeypatch, capsys, trained, images, tmp_path
):
    run, name = tmp_path / "run", next(iter(COLORS))
    shutil.copytree(trained, run / "export")
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples/step-000001.jsonl").write_text('["no record"]\n')
    (run / "export/README.md").write_bytes(b"\x89 no text")
    arguments = (f"run={run}/export", f"image={images}/{name}.png", f"out={tmp_path / 'out'}")
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 2 and "step-000001.jsonl, line 1, is damaged: a list; remove it" in said.err
    (run / "samples/step-000001.jsonl").unlink()
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 0, said.err


def test_peft_computes_what_the_branch_computes(monkeypatch, capsys, trained, loaded, images, tmp_path, parts):
    code, said = command(
        monkeypatch, capsys, f"run={trained}", f"images={images}", f"out={tmp_path / 'out'}", "format=both"
    )
    assert code == 0, said.err
    assert said.out.count("left out m; measured cost: KL") == said.out.count("adapter: ") == 3
    for color in COLORS:
        base = AutoModelForCausalLM.from_pretrained(parts / "llm")
        with_adapter = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / color)).eval()
        with torch.no_grad():
            got = with_adapter(**prompts(loaded[1])).logits
        expected = branch_logits(loaded, "qkvo", color)
        mask = prompts(loaded[1])["attention_mask"].bool()
        torch.testing.assert_close(got[mask], expected[mask], atol=1e-5, rtol=1e-5)
    # The adapter says where its base is, from any folder.
    assert json.loads((tmp_path / "out/red/adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")


def test_several_images_are_summed_into_one(monkeypatch, capsys, trained, loaded, images, tmp_path, parts):
    listed = images / "list.txt"
    listed.write_text("red.png\nblue.png\n")
    code, said = command(monkeypatch, capsys, f"run={trained}", f"images={listed}", "sum=true", f"out={tmp_path / 'o'}")
    assert code == 0, said.err
    base = AutoModelForCausalLM.from_pretrained(parts / "llm")
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(base, str(tmp_path / "o")).eval()(**prompts(loaded[1])).logits
    mask = prompts(loaded[1])["attention_mask"].bool()
    torch.testing.assert_close(got[mask], branch_logits(loaded, "qkvo", "red", "blue")[mask], atol=5e-5, rtol=1e-5)


def test_gguf_holds_the_update_in_llama_cpps_order(monkeypatch, capsys, parts, images, tmp_path):
    """Applied as llama.cpp does to the base in its own row order, then put back: the dense update of every matrix."""
    folder = make_folder(parts, tmp_path / "m", types="q,k,v,o,gate,up,down")
    code, said = command(
        monkeypatch, capsys, f"run={folder}", f"image={images}/red.png", f"out={tmp_path / 'o'}", "format=gguf"
    )
    assert code == 0, said.err
    assert "left out" not in said.out
    from vlora import load

    model, processor = load(folder)
    weights = model.perceive(processor.image_processor(square(COLORS["red"]))["pixel_values"])
    reader = gguf.GGUFReader(tmp_path / "o" / "adapter.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == "llama"
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    config = model.config.text_config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    assert len(tensors) == 2 * len(weights.placement.sites)
    for site in weights.placement.sites:
        a, b = (tensors[f"blk.{site.layer}.{names[site.type]}.weight.lora_{x}"] for x in "ab")
        assert a.shape == (4, site.d_in) and b.shape == (site.d_out, 4)
        update = facts["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        if site.type in heads:
            update = _halves(update, heads[site.type])  # the independent direction: how we read llama.cpp's files
        expected = weights.delta(site, 0).detach().numpy()
        np.testing.assert_allclose(update, expected, atol=1e-5)


WRONG = {
    "no image": (["out=x"], "give image=FILE or images=FOLDER"),
    "missing": (["image=nowhere.png", "out=x"], "nowhere.png: no such image"),
    "m by name": (["image=IMAGES/red.png", "types=q,m", "out=OUT"], "'m' has no place in a LoRA adapter"),
    "not placed": (["image=IMAGES/red.png", "types=gate", "out=OUT"], "'gate' is not placed"),
    "format": (["image=IMAGES/red.png", "format=onnx", "out=OUT"], "format"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_written_is_said(monkeypatch, capsys, trained, images, tmp_path, arguments, message):
    arguments = [a.replace("IMAGES", str(images)).replace("OUT", str(tmp_path / "o")) for a in arguments]
    code, said = command(monkeypatch, capsys, f"run={trained}", *arguments)
    assert code == 2 and message in said.err, said.err


def test_a_connector_without_weights_is_refused(monkeypatch, capsys, parts, images, tmp_path):
    folder = make_folder(parts, tmp_path / "m", "mlp")
    code, said = command(monkeypatch, capsys, f"run={folder}", f"image={images}/red.png", f"out={tmp_path / 'o'}")
    assert code == 2 and "connector=mlp, which makes no weights" in said.err
    assert AutoTokenizer.from_pretrained(folder).eos_token is not None
