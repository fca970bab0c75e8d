"""Whole runs through `python -m train`: two ranks, ZeRO-3, interrupted and resumed, and wrong in every way."""

import json
import os
import re
import shutil
import signal

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlora
from common.files import write_json
from data_prep.store.manifest import build_manifest, read_receipt, write_manifest
from data_prep.store.writer import ShardWriter, write_split
from tests.model import parts
from tests.train import world
from train import adapter, evaluate
from train.measure.results import Evaluation
from train.measure.tracking import read_metrics
from train.measure.weight_space import MOST

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pretrained(home, tmp_path_factory):
    """An undisturbed pretraining."""
    run = tmp_path_factory.mktemp("runs") / "pretrain"
    extensions = tmp_path_factory.mktemp("extensions")
    arguments = world.overrides(home, run, f"stage.steps={STEPS}", "checkpoint.every=10")
    done = world.train(arguments, TORCH_EXTENSIONS_DIR=str(extensions))
    assert done.returncode == 0, done.stderr
    assert not list(extensions.iterdir()), "DeepSpeed compiled an op at its first use"
    assert f"{STEPS} steps of 8 samples, world size 2, ZeRO stage 3" in done.stdout
    assert "ops backend cpu (asked for auto)" in done.stdout
    return run


def losses(run):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r]


def same_tensors(a, b):
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(home, pretrained, tmp_path):
    """SIGKILL to everything after a checkpoint; then SIGTERM; then to the end: bit-identical."""
    arguments = world.overrides(home, tmp_path / "run", f"stage.steps={STEPS}", "checkpoint.every=10")
    process = world.start(arguments)
    world.wait_for(lambda: world.steps_done(tmp_path / "run") >= 12, process)
    world.kill_tree(process)
    assert 10 <= world.steps_done(tmp_path / "run") < STEPS

    process = world.start(arguments)
    world.wait_for(lambda: world.steps_done(tmp_path / "run") >= 25, process)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.wait(timeout=300)
    assert process.returncode == 0, err
    assert "stopped on request" in out and (tmp_path / "run" / "STOPPED").exists()

    done = world.train(arguments)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(pretrained)
    assert [step for step, *_ in losses(pretrained)] == list(range(1, STEPS + 1))
    export = "export/model.safetensors"
    assert same_tensors(tmp_path / "run" / export, pretrained / export)

    # What each rank printed in its three lifetimes, whichever way they ended, once.
    kept = [(tmp_path / f"run/logs/rank-{rank}.log").read_text().splitlines() for rank in (0, 1)]
    for rank, lines in enumerate(kept):
        assert sum(f"rank {rank} starts on" in line for line in lines) == 3
    own = kept[0][max(i for i, line in enumerate(kept[0]) if "rank 0 starts on" in line) :]
    # The first and the last line are the front end's; gloo of torch 2.9 tells of every rank's connections.
    printed = [line for line in done.stdout.splitlines()[1:-1] if not line.startswith("[Gloo]")]
    assert "resumed at step" in "".join(printed)
    assert [line for line in own if line in printed] == printed


def test_a_killed_rank_ends_all_and_a_killed_front_end_stops_them(home, tmp_path):
    arguments = world.overrides(home, tmp_path / "run", "stage.steps=1000")
    for victim, outcome in (("rank", 2), ("front end", -signal.SIGKILL)):
        process, done = world.start(arguments), world.steps_done(tmp_path / "run")
        world.wait_for(lambda done=done: world.steps_done(tmp_path / "run") >= done + 2, process)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        os.kill(ranks[1].pid if victim == "rank" else process.pid, signal.SIGKILL)
        _, err = process.wait(300)
        assert process.returncode == outcome, err
        assert psutil.wait_procs(ranks, 300)[1] == []
        assert (tmp_path / "run" / "STOPPED").exists() == (victim == "front end")
        assert "ended with SIGKILL" in err or victim == "front end"


def test_finetuning_resumes_exactly_and_exports_the_llm(home, pretrained, tmp_path):
    """Cut short by the death of a loader process, which ends the run with one line."""

    def arguments(run):
        return world.overrides(
            home, tmp_path / run, "stage=finetune", f"init_from={pretrained}", "stage.steps=20", "checkpoint.every=5",
            "stage.freeze=[llm.model.embed_tokens.*]", "engine.gradient_checkpointing=true",
        )  # fmt: skip

    assert world.train(arguments("whole")).returncode == 0
    process = world.start([*arguments("cut"), "data.num_workers=1"])
    world.wait_for(lambda: world.steps_done(tmp_path / "cut") >= 7, process)
    loaders = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    loaders[0].kill()
    _, err = process.wait(timeout=300)
    # Of the two ranks, the one whose loader died says why; that the other lost its peer is no news.
    assert process.returncode == 2 and "Traceback" not in err, err
    assert len(re.findall(r"error: DataLoader worker .*lower data.num_workers", err)) == 1, err
    assert world.train(arguments("cut")).returncode == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for file in ("export/model.safetensors", "export/llm/model.safetensors"):
        assert same_tensors(tmp_path / "cut" / file, tmp_path / "whole" / file)
    model, processor = vlora.load(tmp_path / "whole")
    assert model.config.parts["llm"]["path"] == "llm" and model.config.parts["vision"]["base"] is None
    export = load_file(tmp_path / "whole/export/model.safetensors")
    assert all(export["connector." + key].equal(value) for key, value in model.model.connector.state_dict().items())
    inputs = processor.batch([processor.text.encode_prompt([{"role": "user", "content": "what color?"}])], [[]])
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    card = (tmp_path / "whole/export/README.md").read_text()
    assert "20, of 8 samples each" in card and "started from" in card and "trained here, in this folder" in card
    base, tuned = load_file(home / "llm/model.safetensors"), load_file(tmp_path / "whole/export/llm/model.safetensors")
    assert base.keys() == tuned.keys()
    assert base["model.embed_tokens.weight"].equal(tuned["model.embed_tokens.weight"])  # frozen by pattern
    assert not base["model.layers.0.mlp.up_proj.weight"].equal(tuned["model.layers.0.mlp.up_proj.weight"])
    # The first loss of finetuning is that of the pretrained generator: the stage switch loses nothing.
    assert losses(tmp_path / "whole")[0][1] < losses(pretrained)[0][1]


def test_bf16_trains_both_stages_on_tiles(home, tmp_path):
    """As on a GPU: LLM and connector in bf16 over fp32 master weights. Images of several views, a validation split."""
    short = (
        "stage.steps=6", "engine.precision=bf16", "llm.attn_implementation=sdpa", "launch.threads_per_worker=1",
        "vision.image_mode=tiles", "data.val=squares/val", "tracking.num_samples=4",
    )  # fmt: skip
    first, second = tmp_path / "pretrain", tmp_path / "finetune"
    for arguments in (
        world.overrides(home, first, *short),
        world.overrides(home, second, "stage=finetune", f"init_from={first}", *short),
    ):
        done = world.train(arguments)
        assert done.returncode == 0, done.stderr
    for run in (first, second):
        assert [r["step"] for r in read_metrics(run) if "val_loss" in r] == [6]
        table = (run / "samples" / "step-000006.jsonl").read_text().splitlines()
        assert len(table) == 4 and {"sample", "question", "answer", "prediction"} == json.loads(table[0]).keys()
        found = [loss for _, loss, _ in losses(run)]
        assert len(found) == 6 and found[-1] < found[0]
        assert {t.dtype for t in load_file(run / "export/model.safetensors").values() if t.dim() > 1} == {torch.float32}
    assert {t.dtype for t in load_file(second / "export/llm/model.safetensors").values()} == {torch.bfloat16}


def test_a_run_stopped_between_its_last_step_and_its_end_finishes(home, tmp_path):
    """Its first forward is then an evaluation; of a SigLIP, whose pooling head nobody reads. With wandb, no home folder
    to write to, and a secret in the environment that must not be written anywhere."""
    secret = "c0ffee" * 6 + "beef"
    vision = parts.vision("siglip")
    vision.save_pretrained(tmp_path / "siglip")
    shutil.copy(home / "vision" / "preprocessor_config.json", tmp_path / "siglip")
    arguments = world.overrides(
        home, tmp_path / "run", "stage.steps=2", f"vision.path={tmp_path}/siglip", "data.val=squares/val",
        "tracking.num_samples=2", "tracking.wandb=offline",
    )  # fmt: skip
    done = world.train(arguments, HOME="/dev/null", WANDB_API_KEY=secret)
    assert done.returncode == 0, done.stderr
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not [file for file in written if secret.encode() in file.read_bytes()]
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    (tmp_path / "run" / "DONE").unlink()
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.rmtree(tmp_path / "run" / "samples")
    done = world.train(arguments)
    assert done.returncode == 0 and "resumed at step 2" in done.stdout, done.stderr
    assert same_tensors(tmp_path / "run/export/model.safetensors", tmp_path / "whole/export/model.safetensors")
    table = "samples/step-000002.jsonl"
    assert (tmp_path / "run" / table).read_text() == (tmp_path / "whole" / table).read_text()
    validation = [[r["val_loss"] for r in read_metrics(tmp_path / n) if "val_loss" in r] for n in ("run", "whole")]
    assert validation[0] == validation[1] and len(validation[0]) == 1


def test_another_number_of_ranks_goes_on(home, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    for name in ("DONE", "checkpoints/step-000060/COMPLETE"):
        (tmp_path / "run" / name).unlink()
    arguments = world.overrides(
        home, tmp_path / "run", f"stage.steps={STEPS}", "checkpoint.every=10", "launch.workers=1"
    )
    done = world.train(arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 50" in done.stdout
    for (step, loss, _), (_, reference, _) in zip(losses(tmp_path / "run"), losses(pretrained), strict=True):
        assert loss == pytest.approx(reference, rel=1e-3), step


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(pretrained, tmp_path, capsys):
    from train.engine import checkpoint

    shutil.copytree(pretrained / "checkpoints", tmp_path / "checkpoints")
    assert checkpoint.find(tmp_path).name == "step-000060"
    shard = next((tmp_path / "checkpoints" / "step-000060").glob("*optim*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert checkpoint.find(tmp_path).name == "step-000050"
    said = capsys.readouterr().err
    assert re.search(r"step-000060: zero\S+optim_states.pt is not what was written.*step-000050 is used", said), said
    assert (tmp_path / "checkpoints" / "damaged-step-000060").is_dir()
    (tmp_path / "checkpoints" / "step-000050" / "COMPLETE").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in .* can be used: step-000050: .*COMPLETE"):
        checkpoint.find(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert checkpoint.find(tmp_path) is None


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(("ranks", "kind"), [(2, "model_states"), (2, "optim_states"), (1, "optim_states")])
def test_a_command_planted_in_a_checkpoint_is_refused_by_name_and_never_run(home, pretrained, tmp_path, ranks, kind):
    """By someone who can write all of the run directory, checksums too; with one rank it is converted first."""
    from common.files import read_json, seal, write_json

    shutil.copytree(pretrained, tmp_path / "run")
    (tmp_path / "run" / "DONE").unlink()
    folder = tmp_path / "run" / "checkpoints" / "step-000060"
    shard = folder / f"zero_pp_rank_1_mp_rank_00_{kind}.pt"
    content = torch.load(shard, weights_only=False)
    torch.save({**content, "extra": Planted(tmp_path / "trace")}, shard)
    record = read_json(folder / "COMPLETE", "")
    record["files"] = seal(folder, list(record["files"]))
    write_json(folder / "COMPLETE", record)
    done = world.train(
        world.overrides(
            home, tmp_path / "run", f"stage.steps={STEPS}", "checkpoint.every=10", f"launch.workers={ranks}"
        )
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    refused = rf"error: .*{shard.name} holds `(posix|nt).system`.*nothing of it was run"
    assert re.search(refused, done.stderr), done.stderr
    assert not (tmp_path / "trace").exists()


def test_a_finished_run_is_left_alone(home, pretrained):
    before = (pretrained / "export" / "model.safetensors").stat().st_mtime_ns
    done = world.train(world.overrides(home, pretrained, f"stage.steps={STEPS}", "checkpoint.every=10"))
    assert done.returncode == 0 and "finished" in done.stdout
    assert (pretrained / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_adapter_of_one_image(pretrained, tmp_path, monkeypatch, capsys):
    (tmp_path / "red.png").write_bytes(world.picture(world.COLORS["red"]))
    arguments = ["-", f"run={pretrained}", f"image={tmp_path}/red.png", f"out={tmp_path}/adapter"]
    monkeypatch.setattr("sys.argv", [*arguments, "types=q,k,v,o"])
    adapter.main()
    printed = capsys.readouterr().out
    assert "merged into float32 weights" in printed and "m      runs as a branch" in printed
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 2 * 4  # types, factors, layers
    assert any(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)
    monkeypatch.setattr("sys.argv", [*arguments, "types=qkvom"])
    with pytest.raises(ValueError, match="'m' has no place in a LoRA adapter.*types=q,k,v,o leaves it out"):
        adapter.main()


def test_answers_do_not_depend_on_the_batch(pretrained):
    """Greedy, with a KV cache and left padding: one question at a time gives the text that all together give."""
    answers = []
    for size in (1, 7):
        arguments = [f"run={pretrained}", "split=squares/train", "max_samples=30", f"batch_size={size}"]
        done = world.train(arguments, module="train.evaluate")
        assert done.returncode == 0, done.stderr
        file = pretrained / "evaluation" / "squares-train-real.jsonl"
        answers.append([json.loads(line) for line in file.read_text().splitlines()])
    assert len(answers[0]) == 30 and len({a["prediction"] for a in answers[0]}) > 1
    assert answers[0] == answers[1]
    space = Evaluation.read(file.with_suffix(".json")).weights
    seen = {answer["sample"] for answer in answers[0] if answer["shown"]}
    assert set(space.samples) <= seen and len(space.samples) == min(MOST, len(seen))
    assert np.allclose(space.products, space.products.T, rtol=1e-4) and 1 < space.effective_rank < len(seen)


def test_text_first_and_a_single_image_train_on_two_ranks(home, tmp_path):
    """Feature statistics are measured over whatever has images. A shard that all ranks find corrupt is named once."""
    made = world.samples(10)
    write_split(home / "data" / "texts", [sample for sample in made if not sample.images] * 4)
    write_split(home / "data" / "one", made[:1])
    torn = home / "data" / "torn"
    for number in range(2):
        with ShardWriter(torn, number, "") as writer:
            for sample in world.samples(20)[10 * number : 10 * number + 10]:
                writer.add(sample)
    write_manifest(torn, build_manifest(torn, [read_receipt(torn, n) for n in range(2)], "made", "torn", {}))
    (torn / "shard-00001.arrow").unlink()
    mixture = "data.train=[{path: texts, weight: 1.0}, {path: one, weight: 1.0}, {path: torn, weight: 1.0}]"
    words = ["stage.steps=2", "data.on_corrupt_shard=drop", mixture]
    done = world.train(world.overrides(home, tmp_path / "run", *words))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"warning: .*shard-00001\.arrow.* its 10 samples are left out", done.stderr)) == 1, (
        done.stderr
    )
    done = world.train(world.overrides(home, tmp_path / "none", "stage.steps=2", "data.train=[{path: texts}]"))
    assert done.returncode == 2 and "no sample with an image" in done.stderr, done.stderr


def test_fewer_questions_do_not_replace_the_results_of_more(tmp_path):
    for count, expected in ((30, "test-real"), (30, "test-real"), (4, "test-real-4"), (50, "test-real")):
        name = evaluate._free_name(tmp_path, "test-real", count)
        assert name == expected
        if name == "test-real":
            write_json(tmp_path / f"{name}.json", {"count": count})


def unreadable_image(home, tmp_path):
    broken = world.samples(8)
    broken[3].images = [b"\x89PNG\r\n\x1a\n not a picture"]
    write_split(home / "data" / "broken", broken)
    return ["data.train=[{path: broken, weight: 1.0}]"], r"broken.*sample square/3"


def no_target(home, tmp_path):
    empty = world.samples(8)
    empty[2].conversations = [world.dialogue("what color is the shape?", "red")] * 30
    write_split(home / "data" / "long", empty)
    return ["data.train=[{path: long, weight: 1.0}]", "data.max_length=5"], r"sample square/\d.*max_length"


def other_llm(home, tmp_path):
    other = world.make(tmp_path / "other", seed=1)
    return ["stage=finetune", "init_from=PRETRAINED", f"llm.path={other}/llm"], r"was trained with another llm"


def not_finite(home, tmp_path):
    shutil.copytree(home / "llm", tmp_path / "llm")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    return [
        f"llm.path={tmp_path}/llm"
    ], r"first loss, of step 1, is nan: 1 of 1536 values .* llm\.model\.layers\.2\.mlp\.up"


CASES = {
    "unknown key": lambda *_: (["generator.rnak=4"], r"unknown configuration key `generator\.rnak`; did you mean"),
    "wrong type": lambda *_: (["generator.rank=many"], r"`generator\.rank`"),
    "rank too large": lambda *_: (["generator.rank=999"], r"generator\.rank=999 is above the width"),
    "missing checkpoint": lambda *_: (["stage=finetune", "init_from=nowhere"], r"nowhere has no finished export"),
    "missing model": lambda *_: (["llm.path=./nowhere"], r"llm\.path=\./nowhere: no such folder"),
    "missing data": lambda *_: (["data.train=[{path: nowhere, weight: 1.0}]"], r"nowhere"),
    "unreadable image": unreadable_image,
    "too long": no_target,
    "other llm": other_llm,
    "weights not finite": not_finite,
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_end_in_one_line_and_a_code(case, home, pretrained, tmp_path):
    extra, message = CASES[case](home, tmp_path)
    extra = [value.replace("PRETRAINED", str(pretrained)) for value in extra]
    done = world.train(world.overrides(home, tmp_path / "run", "stage.steps=4", "launch.workers=1", *extra))
    assert done.returncode == 2, (done.returncode, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(message, errors[0]), errors[0]


def test_the_same_run_dir_with_another_configuration_is_refused(home, pretrained):
    done = world.train(world.overrides(home, pretrained, f"stage.steps={STEPS}", "generator.rank=2"))
    assert done.returncode == 2
    assert "holds a run with" in done.stderr


def test_no_room_on_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import torch

    from train.engine import saving

    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    engine = SimpleNamespace(model=torch.nn.Linear(100, 100), device=torch.device("cpu"))
    with pytest.raises(saving.CheckpointError, match=r"no room on disk.*GB needed.*earlier checkpoints"):
        saving._check_room(engine, tmp_path)


def test_metrics_hold_what_the_run_promises(pretrained):
    records = read_metrics(pretrained)
    first = records[0]
    for key in ("loss", "grad_norm", "samples_per_s", "tokens_per_s", "lr/connector", "lr/heads", "lr/output_factors",
                "image_share", "delta_ratio/mean", "delta_ratio/0.q", "memory/host_gib", "tflops_per_s_per_rank",
                "supervised_fraction"):  # fmt: skip
        assert key in first, key
    assert first["delta_ratio/mean"] == 0 and records[-1]["delta_ratio/mean"] > 0
    record = json.loads((pretrained / "run.json").read_text())
    assert record["git_commit"] and record["versions"]["torch"]
