"""The trained model through transformers' own doors, and against the plain training model."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

import vlora
from data_prep.text.encoder import TextEncoder
from data_prep.text.templates import NAMES
from model.loading import ModelError
from model.vlm import build_model
from tests.train import world
from tests.vlora.conftest import make_folder, square
from train.data.collate import EncodedSample, collate
from vlora import folder as folders
from vlora.chat_templates import chat_template

RED, BLUE = square((220, 20, 20)), square((20, 20, 220))
QUESTION = "what color is the shape?"


def messages(*images, question=QUESTION):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def inputs(processor, *conversations):
    return processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"connector": "mlp"},
        {"connector": "qformer"},
        {"connector": "crossattn"},
        {"own_llm": True},
        {"dtype": "bfloat16"},
        {"own_llm": True, "dtype": "bfloat16"},
    ],
    ids=lambda case: "-".join(map(str, case.values())) or "vlora",
)
def test_a_folder_answers_as_the_training_model_and_survives_saving(parts, tmp_path, case):
    folder = make_folder(parts, tmp_path / "model", **case)
    model, processor = vlora.load(folder)
    settings = model.config.model_config(folders.part_path(folder, model.config, "llm"), str(parts / "vision"))
    reference = build_model(settings, model.dtype)
    reference.connector.load_state_dict(folders.read_connector(folder))
    reference.eval()
    text = processor.text
    rows = [text.encode([{"role": "user", "content": q}, {"role": "assistant", "content": "red"}]) for q in (QUESTION,)]
    pieces = [
        EncodedSample("here", [RED], rows),
        EncodedSample("there", [RED, BLUE], rows),
        EncodedSample("text", [], rows),
    ]
    batch = collate(pieces, processor.image_processor.pixels, text.pad_id, left=True).to("cpu", model.dtype)
    with torch.no_grad():
        expected = reference(batch)
        got = model(
            batch.input_ids,
            batch.attention_mask,
            pixel_values=batch.images,
            image_to_row=batch.image_to_sample,
            labels=batch.labels,
        )
    assert got.loss.item() == pytest.approx(expected.loss_sum.item() / expected.n_targets, abs=1e-6)

    asked = inputs(processor, messages(RED), messages(RED, BLUE), messages())
    out = model.generate(**asked, max_new_tokens=6)
    assert torch.equal(out[:, : asked["input_ids"].shape[1]], asked["input_ids"])
    for standalone in (False, True):
        home = tmp_path / f"again-{standalone}"
        model.save_pretrained(home, standalone=standalone)
        processor.save_pretrained(home)
        again = AutoModelForImageTextToText.from_pretrained(home)
        assert again.dtype == model.dtype
        reader = AutoProcessor.from_pretrained(home)
        asked = inputs(reader, messages(RED), messages(RED, BLUE), messages())
        assert torch.equal(again.generate(**asked, max_new_tokens=6), out)
        copied = {"llm", "vision"} if standalone else {"llm"} if case.get("own_llm") else set()
        assert {p.name for p in home.iterdir() if p.is_dir()} == copied


def test_pipeline_and_auto_classes_know_the_folder(trained, loaded):
    model, processor = loaded
    assert type(AutoConfig.from_pretrained(trained)) is vlora.VLoRAConfig
    assert type(AutoProcessor.from_pretrained(trained)) is vlora.VLoRAProcessor
    answers = pipeline("image-text-to-text", model=str(trained))(text=messages(world_image()), max_new_tokens=5)
    asked = inputs(processor, messages(world_image()))
    out = model.generate(**asked, max_new_tokens=5)[0, asked["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(out, skip_special_tokens=True)
    assert answers[0]["generated_text"][-1]["content"].strip() == expected.strip()


def world_image():
    from vlora.processing import open_picture

    return open_picture(RED)


def test_rows_are_independent_of_their_batch(loaded):
    """Images, none and several in one batch: logits as alone."""
    model, processor = loaded
    chats = [messages(RED), messages(), messages(RED, BLUE), messages(BLUE, question="is there a red shape?")]
    together = inputs(processor, *chats)
    with torch.no_grad():
        whole = model(**together).logits[:, -1]
        for number, chat in enumerate(chats):
            alone = model(**inputs(processor, chat)).logits[0, -1]
            torch.testing.assert_close(whole[number], alone, atol=2e-5, rtol=1e-4)


def test_the_folder_is_found_again_when_everything_moves(parts, tmp_path):
    """Parts and model move together to another place; then the parts alone, which takes an argument."""
    home = tmp_path / "old"
    shutil.copytree(parts, home / "parts")
    folder = make_folder(home / "parts", home / "runs" / "r" / "export")
    moved = tmp_path / "new" / "place"
    shutil.copytree(home, moved)
    shutil.rmtree(home)
    model, _ = vlora.load(moved / "runs" / "r")
    assert model.dtype == torch.float32
    shutil.move(moved / "parts", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"takes its llm from .*llm\.path=\.\.\."):
        vlora.load(moved / "runs" / "r" / "export")
    vlora.load(moved / "runs" / "r", llm=str(tmp_path / "elsewhere/llm"), vision=str(tmp_path / "elsewhere/vision"))
    other = world.make(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="another llm"):
        vlora.load(moved / "runs" / "r", llm=str(other / "llm"), vision=str(tmp_path / "elsewhere/vision"))
    assert not folder.exists()


def test_others_may_read_the_files_and_nothing_is_pickled(loaded, tmp_path):
    before = os.umask(0o022)
    try:
        loaded[0].save_pretrained(tmp_path / "m", standalone=True)
        loaded[1].save_pretrained(tmp_path / "m")
    finally:
        os.umask(before)
    files = [f for f in (tmp_path / "m").rglob("*") if f.is_file()]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o644}
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".jinja"}


def test_what_a_user_trained_is_never_left_out(trained, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(trained)
    assert not any(p.requires_grad for p in model.model.llm.parameters())  # only referred to
    model.model.llm.requires_grad_(True)
    with torch.no_grad():
        model.model.llm.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "m")
    assert load_file(tmp_path / "m/llm/model.safetensors")["lm_head.weight"].equal(model.model.llm.lm_head.weight)
    record = json.loads((tmp_path / "m/config.json").read_text())["parts"]["llm"]
    assert record["path"] == "llm" and record["base"]["fingerprint"] == model.config.parts["llm"]["fingerprint"]


def test_options_that_would_be_ignored_are_refused(trained):
    with pytest.raises(TypeError, match="quantization_config"):
        AutoModelForImageTextToText.from_pretrained(trained, quantization_config={})
    with pytest.raises(ModelError, match="one device"):
        vlora.VLoRAForConditionalGeneration.from_pretrained(trained, device_map={"model.llm": "cpu", "model": "cpu"})
    with pytest.raises(ModelError, match="neither a run directory"):
        vlora.load("no/such/model", device="cpu")


@pytest.mark.parametrize("template", [name for name in NAMES if name not in ("chat", "plain")])
def test_jinja_says_what_training_said(template, parts):
    tokenizer = AutoTokenizer.from_pretrained(parts / "llm")
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<s>",
                "</s>",
                "<|begin_of_text|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
            ]
        }  # fmt: skip
    )
    text, turns = TextEncoder(tokenizer, template), []
    system = {"role": "system", "content": "be brief"}
    for question, answer in (("is it red?", "no"), ("blue?", "yes")):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for dialogue in (turns, [system, *turns]):
            jinja = chat_template(template, tokenizer)
            rendered = tokenizer.apply_chat_template(dialogue, chat_template=jinja, tokenize=False)
            assert rendered == "".join(piece.text for piece in text.render(dialogue))


def test_imports_start_nothing_distributed_and_work_from_anywhere(trained, tmp_path):
    code = (
        "import sys, vlora; model, _ = vlora.load(sys.argv[1]); import torch.distributed as d;"
        "assert not d.is_initialized() and 'deepspeed' not in sys.modules; print(model.dtype)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "torch.float32", done.stderr


class _Hub:
    """The hub's storage as a folder: what a commit adds is copied there."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        from huggingface_hub import RepoUrl

        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, operations, **_):
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as stream:
                target.write_bytes(stream.read())


@pytest.mark.parametrize("own_llm", [False, True])
def test_what_is_pushed_is_all_that_is_needed_and_nothing_of_this_machine(parts, tmp_path, monkeypatch, own_llm):
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    def absent(*_, **__):
        raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(hub, "hf_api", lambda: _Hub(tmp_path / "hub"))
    monkeypatch.setattr(ModelCard, "load", absent)
    home = shutil.copytree(parts, tmp_path / "secret" / "parts")
    folder = make_folder(home, tmp_path / "secret" / "model", own_llm=own_llm)
    (folder / "README.md").write_text("# what it was trained on\n")
    model, processor = vlora.load(folder)
    processor.push_to_hub("someone/something")
    model.push_to_hub("someone/something")
    asked = inputs(processor, messages(RED), messages(RED, BLUE), messages())
    expected = model.generate(**asked, max_new_tokens=6)
    shutil.rmtree(tmp_path / "secret")

    files = {str(f.relative_to(tmp_path / "hub")) for f in (tmp_path / "hub").rglob("*") if f.is_file()}
    needed = {"config.json", "model.safetensors", "generation_config.json", "processor_config.json"}
    needed |= {"tokenizer.json", "README.md", "llm/config.json", "llm/model.safetensors", "vision/model.safetensors"}
    assert needed <= files and {Path(f).suffix for f in files} <= {".json", ".safetensors", ".jinja", ".md"}
    for file in files:
        assert str(tmp_path).encode() not in (tmp_path / "hub" / file).read_bytes(), file
    assert (tmp_path / "hub/README.md").read_text() == "# what it was trained on\n"
    again, reader = vlora.load(tmp_path / "hub")
    asked = inputs(reader, messages(RED), messages(RED, BLUE), messages())
    assert again.generate(**asked, max_new_tokens=6).equal(expected)
