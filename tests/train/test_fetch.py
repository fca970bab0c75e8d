"""Models as the hub ships them: fetched, converted, checked, trained; and damaged in every way we could think of."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from data_prep.store.errors import DataError
from model.config import LLMConfig
from model.loading import build_llm, fingerprint
from model.pretrained import ModelError, locate
from tests.model import hub
from tests.train import world
from train import config as configuration
from train.fetch import fetch, verify


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Both folders, and the language model that is in one of them."""
    home = tmp_path_factory.mktemp("hub")
    hub.clip(home / "clip")
    return home, hub.vicuna(home / "vicuna")


def test_shards_are_converted_once_tensor_for_tensor(shipped, tmp_path):
    home, model = shipped
    with pytest.raises(ModelError, match=r"ships pytorch_model-00001.*train\.fetch"):
        locate("llm", str(home / "vicuna"), tmp_path)
    folder = fetch("llm", str(home / "vicuna"), tmp_path)
    assert verify("llm", folder, {"hidden_size": 32}) == sum(p.numel() for p in model.parameters())
    found = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for n in (1, 2):
        shard = torch.load(home / "vicuna" / f"pytorch_model-0000{n}-of-00002.bin", weights_only=True)
        assert all(torch.equal(found.pop(name), tensor) for name, tensor in shard.items())
    assert not found
    loaded = build_llm(LLMConfig(path=str(folder)), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    # Again: nothing is made anew, and the identity stays.
    before, identity = (folder / "converted.json").stat().st_mtime_ns, fingerprint(str(folder))
    assert fetch("llm", str(home / "vicuna"), tmp_path) == folder == locate("llm", str(home / "vicuna"), tmp_path)
    assert (folder / "converted.json").stat().st_mtime_ns == before and fingerprint(str(folder)) == identity


def test_tensors_that_share_memory_are_written_whole(shipped, tmp_path):
    home, _ = shipped
    shutil.copytree(home / "clip", tmp_path / "clip")
    tensors = torch.load(tmp_path / "clip/pytorch_model.bin", weights_only=True)
    base = torch.arange(12.0).view(3, 4)
    tensors |= {"a": base, "b": base, "c": base.T, "d": base[1:]}
    torch.save(tensors, tmp_path / "clip/pytorch_model.bin", _use_new_zipfile_serialization=False)  # the old format too
    found = load_file(fetch("vision", str(tmp_path / "clip"), tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


class _Code:
    def __reduce__(self):
        return print, ("owned",)


def _drop(name):
    return lambda folder: (folder / name).unlink()


def _cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _pickled(value, name="pytorch_model-00001-of-00002.bin"):
    def damage(folder):
        if isinstance(value, _Code):
            (folder / name).write_bytes(pickle.dumps({"model.norm.weight": value}))
        else:
            torch.save(value, folder / name)

    return damage


def _edit(name, **fields):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return damage


SHARD = "pytorch_model-00002-of-00002.bin"
DAMAGES = {
    "a shard is not there": (
        _drop(SHARD),
        rf"lacks 1 of the 2 files that .* names, first {SHARD}: the download",
    ),
    "a shard is cut": (_cut(SHARD, 5000), rf"{SHARD} is damaged or not complete.*copy it again"),
    "an empty shard": (_cut(SHARD, 0), rf"{SHARD} is damaged or not complete.*copy it again"),
    "a pointer of Git LFS": (
        lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"is a Git LFS pointer.*git lfs pull",
    ),
    "code in a pickle": (_pickled(_Code()), r"holds something other than tensors; refused"),
    "a module in a pickle": (_pickled({"a": torch.nn.Linear(1, 1)}), r"holds something other than tensors; refused"),
    "numbers in a pickle": (_pickled({"a": 1}), r"holds something other than tensors; refused"),
    "another shard": (
        _pickled({"a": torch.ones(1)}),
        r"00001-of-00002\.bin and .*index\.json do not agree, first on a",
    ),
    "no index": (_drop("pytorch_model.bin.index.json"), r"has pytorch_model-00001.*, but no pytorch_model\.bin\.index"),
    "a broken index": (_cut("pytorch_model.bin.index.json", 40), r"is not an index of weights.*copy it again"),
    "no configuration": (_drop("config.json"), r"has no config\.json"),
    "a broken configuration": (_cut("config.json", 30), r"config\.json cannot be read"),
    "no tokenizer": (_drop("tokenizer.model"), r"its tokenizer cannot be read.*tokenizer\.model"),
    "a broken tokenizer": (_cut("tokenizer.model", 600), r"its tokenizer cannot be read"),
    "more layers": (_edit("config.json", num_hidden_layers=5), r"lack \d+ tensors, first model\.layers\.4\."),
    "another width": (_edit("config.json", intermediate_size=64), r"are of two models, first at .*mlp"),
    "another model": (_edit("config.json", hidden_size=64), r"has hidden_size=64, but llm\.architecture expects 32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_line(shipped, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    shutil.copytree(shipped[0] / "vicuna", tmp_path / "vicuna")
    damage(tmp_path / "vicuna")
    with pytest.raises(ModelError, match=message) as error:
        verify("llm", fetch("llm", str(tmp_path / "vicuna"), tmp_path / "cache"), {"hidden_size": 32})
    assert len(str(error.value)) < 400
    assert "owned" not in capsys.readouterr().out  # what the pickle would have run


WHOLE = "pytorch_model.bin"
ENCODER_DAMAGES = {
    "no weights": (_drop(WHOLE), r"holds no weights"),
    "cut weights": (_cut(WHOLE, 3000), rf"{WHOLE} is damaged or not complete.*copy it again"),
    "code in a pickle": (_pickled(_Code(), WHOLE), r"holds something other than tensors; refused"),
    "the text half alone": (_pickled({"text_model.a": torch.ones(1)}, WHOLE), r"lack \d+ tensors, first embeddings"),
    "no configuration": (_drop("config.json"), r"has no config\.json"),
    "a broken configuration": (_cut("config.json", 30), r"config\.json cannot be read"),
    "no image processor": (_drop("preprocessor_config.json"), r"preprocessor_config\.json"),
    "a broken image processor": (_cut("preprocessor_config.json", 30), r"preprocessor_config\.json"),
    "another model": (_edit("config.json", model_type="bert"), r"vision"),
}


@pytest.mark.parametrize("name", ENCODER_DAMAGES)
def test_damage_of_an_encoder_is_one_clear_line(shipped, tmp_path, capsys, name):
    damage, message = ENCODER_DAMAGES[name]
    shutil.copytree(shipped[0] / "clip", tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises((ModelError, DataError), match=message) as error:
        verify("vision", fetch("vision", str(tmp_path / "clip"), tmp_path / "cache"), None)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    assert "owned" not in capsys.readouterr().out


def test_changed_or_vanished_files_are_noticed(shipped, tmp_path):
    shutil.copytree(shipped[0] / "clip", tmp_path / "clip")
    folder = fetch("vision", str(tmp_path / "clip"), tmp_path)
    tensors = torch.load(tmp_path / "clip/pytorch_model.bin", weights_only=True)
    torch.save(tensors | {"more": torch.ones(9)}, tmp_path / "clip/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"not those that .* was made of; run `python -m train\.fetch`"):
        locate("vision", str(tmp_path / "clip"), tmp_path)
    assert "more" in load_file(fetch("vision", str(tmp_path / "clip"), tmp_path) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        locate("vision", str(folder), tmp_path)


def test_a_hub_name_is_found_where_it_lies_and_else_the_files_to_copy_are_named(shipped, tmp_path, monkeypatch):
    home, _ = shipped
    # Hugging Face's own cache, with the configuration only: a download that was cut short.
    snapshot = tmp_path / "hf/models--lmsys--vicuna-7b-v1.5/snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    shutil.copy(home / "vicuna/config.json", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "lmsys/vicuna-7b-v1.5"
    with pytest.raises(ModelError, match="holds no weights.*the download is not complete"):
        locate("llm", name, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"cannot be downloaded from here .*Copy config\.json.*models/lmsys/vicuna"):
        fetch("llm", name, tmp_path / "cache")
    with pytest.raises(ModelError, match=r"openai/clip.* is not on this machine; run `python -m train\.fetch`"):
        locate("vision", "openai/clip-vit-large-patch14-336", tmp_path / "cache")
    # Completed, it is used from there; copied by hand into our cache, from here.
    shutil.copytree(home / "vicuna", snapshot, dirs_exist_ok=True)
    first = fetch("llm", name, tmp_path / "cache")
    shutil.copytree(home / "vicuna", tmp_path / "cache/models" / name)
    second = fetch("llm", name, tmp_path / "cache")
    assert first != second == locate("llm", name, tmp_path / "cache") and fingerprint(str(first)) == fingerprint(
        str(second)
    )


def test_a_missing_model_is_named_before_anything_else(shipped, tmp_path):
    """In check with the rest below it; else nothing is written."""
    arguments = ["experiment=vlora_7b", f"cache_dir={tmp_path}", "launch=slurm", f"run_dir={tmp_path}/run"]
    done = world.train(arguments)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = (line for line in done.stderr.splitlines() if "RuntimeWarning" not in line)  # of the tests' own start
    assert line.startswith("error: llm.path=lmsys/vicuna-7b-v1.5 is not on this machine")
    done = world.train([*arguments, "check=true"])
    assert done.returncode == 0, done.stderr
    named = [line.split()[2].split("=")[0] for line in done.stdout.splitlines() if line.startswith("not here:")]
    assert named[:2] == ["llm.path", "vision.path"]
    assert "851,891,712   7,041,923,072" in done.stdout


@pytest.mark.slow
def test_from_the_hubs_folders_to_an_evaluation(shipped, tmp_path):
    """fetch -> check -> pretrain -> finetune -> evaluate, in the paper's configuration but for sizes."""
    home, _ = shipped
    data = world.make(tmp_path / "world")

    def arguments(run, *more):
        return [
            "experiment=vlora_7b", "engine=cpu", "launch=local", f"llm.path={home}/vicuna", f"vision.path={home}/clip",
            "llm.architecture=null", "vision.architecture=null", f"cache_dir={tmp_path}/cache",
            f"data.root={data}/data",
            "data.train=[{path: squares/train, weight: 1.0}]", "data.batch_size=8", "generator.width=16",
            "generator.num_heads=2", "generator.rank=4", "generator.num_blocks=1", "stage.steps=3", "stage.epochs=null",
            "engine.micro_batch_size=null", "data.num_workers=0", "engine.persistence_threshold=0",
            "tracking.wandb=disabled", f"run_dir={tmp_path}/{run}", *more,
        ]  # fmt: skip

    second = ["stage=finetune", f"init_from={tmp_path}/first"]
    plain = ["data.template=vicuna_v1"]  # the squares are questions, not captions
    done = world.train(arguments("first", *plain))
    assert done.returncode == 2 and "train.fetch" in done.stderr
    for command in (
        lambda: world.train(arguments("first"), module="train.fetch"),
        lambda: world.train(arguments("first", "check=true", *plain)),
        lambda: world.train(arguments("first", *plain)),
        lambda: world.train(arguments("second", *second)),
        lambda: world.train(
            [f"run={tmp_path}/second", "split=squares/val", "max_new_tokens=3"], module="train.evaluate"
        ),
    ):
        done = command()
        assert done.returncode == 0, done.stderr
    assert "6 of 12" in done.stdout or "12 of 12" in done.stdout
    # The run is recorded under the names that were given, and resumes with them.
    assert configuration.read(tmp_path / "second/config.yaml").llm.path == f"{home}/vicuna"
    with pytest.raises(UserError):
        configuration.read(tmp_path / "nothing")
