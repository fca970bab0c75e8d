"""Finetuning through adapters of the LLM, through the whole product: two ranks, ZeRO-3, resumed, exported, used."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vlora
from tests.train import world
from train.measure.tracking import read_metrics
from vlora import Conversation


def losses(run):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r]


@pytest.mark.slow
def test_adapters_train_resume_bit_for_bit_and_are_folded_in(tmp_path):
    home = world.make(tmp_path / "world")
    first, run, last = (tmp_path / name for name in ("pretrain", "finetune", "again"))
    assert world.train(world.overrides(home, first, "stage.steps=8")).returncode == 0
    arguments = world.overrides(
        home, run, "stage=finetune", f"init_from={first}", "stage.train.llm=lora", "stage.lora.rank=4",
        "stage.lora.alpha=8", "stage.lora.dropout=0.2", "stage.freeze=['llm.model.layers.0.*']", "stage.steps=8",
        "checkpoint.every=4", "optim.lr.llm=1e-2", "engine.gradient_checkpointing=true",
    )  # fmt: skip
    done = world.train(arguments)
    assert done.returncode == 0, done.stderr
    whole = losses(run)
    assert len(whole) == 8 and whole[-1][1] < whole[0][1]
    shutil.move(run / "export", tmp_path / "whole")
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints/step-000008")
    done = world.train(arguments)
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    assert losses(run) == whole
    for file in ("model.safetensors", "llm/model.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = load_file(run / "export" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)

    # The merged LLM is peft's: the base that the adapters name, with them.
    base, merged = load_file(home / "llm/model.safetensors"), load_file(run / "export/llm/model.safetensors")
    changed = {name for name in base if not base[name].equal(merged[name])}
    assert base.keys() == merged.keys() and len(changed) == 7 * 3
    assert not any(name.startswith("model.layers.0.") for name in changed)
    settings = json.loads((run / "export/lora/adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 8
    plain = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    ids = torch.arange(3, 11)[None]
    theirs = PeftModel.from_pretrained(plain, run / "export/lora")(input_ids=ids).logits
    model, processor = vlora.load(run)
    torch.testing.assert_close(model.model.llm(input_ids=ids).logits, theirs, rtol=1e-5, atol=1e-5)
    assert "llm through adapters of rank 4" in (run / "export/README.md").read_text()

    # A question at the command line is answered by the merged LLM.
    (tmp_path / "red.png").write_bytes(world.picture(world.COLORS["red"]))
    question = "what color is the shape?"
    words = [f"run={run}", f"image={tmp_path}/red.png", f"question={question}", "--json"]
    done = world.train(words, module="serve.ask")
    assert done.returncode == 0, done.stderr
    with Conversation(model, processor, [tmp_path / "red.png"]) as talk:
        assert json.loads(done.stdout)["answers"][0]["answer"] == talk.ask(question)

    again = world.overrides(home, last, "stage=finetune", f"init_from={run}", "stage.train.llm=false", "stage.steps=1")
    for module, words in (("train.evaluate", [f"run={run}", "split=squares/val"]), ("train", again)):
        done = world.train(words, module=module)
        assert done.returncode == 0, done.stderr
    assert (run / "evaluation/squares-val-real.json").exists()
    kept = load_file(last / "export/llm/model.safetensors")
    assert all(kept[name].equal(merged[name]) for name in merged)  # starts from the merged LLM
