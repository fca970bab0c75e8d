"""Finds the files of a pretrained model, fetches what is missing, and turns `.bin` weights into safetensors once.

Training reads safetensors and nothing else. Where a model comes from, in this order:

    FOLDER                      as given by `llm.path` / `vision.path`
    CACHE/models/ORG/NAME       a hub name, copied there by hand (nodes without internet)
    Hugging Face's own cache    a hub name, as `huggingface_hub` left it
    CACHE/converted/...         safetensors made of a folder with `pytorch_model*.bin`; `converted.json` is its receipt

A pickle is read with `torch.load(weights_only=True)`: tensors, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.files import file_sha256, sync, write_atomically

RECEIPT = "converted.json"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # configuration, tokenizer, image processor
_POINTER = b"version https://git-lfs"


class ModelError(ValueError):
    """A model part cannot be found, or is not the one the configuration describes."""


def is_folder(path: str) -> bool:
    """Whether `path` means a folder, there or not, in place of a name on the hub."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).expanduser().is_dir()


def locate(what: str, path: str, cache: str | Path) -> Path:
    """The folder with the configuration and the safetensors of a model. Reads no weights and asks no network.

    Args:
        what: `llm` or `vision`, for messages.
        path: Folder or hub name.
        cache: `cache_dir` of the run.

    Raises:
        ModelError: not here, or not in the form that training reads; says what to do.
    """
    source = find_source(what, path, cache)
    if source is None:
        raise ModelError(f"{what}.path={path} is not on this machine; {fetch_hint(what, path)}")
    names = weight_files(what, source)
    if names[0].endswith(".safetensors"):
        return source
    folder = converted_folder(source, cache)
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(
            f"{what}.path={path} ships {names[0]}, which is turned into safetensors once; {fetch_hint(what, path)}"
        ) from None
    if receipt["source"] != _sizes(source, names):
        raise ModelError(
            f"{what}.path={path}: its .bin files are not those that {folder} was made of; {fetch_hint(what, path)}"
        )
    return folder


def fetch_hint(what: str, path: str) -> str:
    """What to do about a model that is not here."""
    return f"run `python -m train.fetch` with the overrides of this command (or with {what}.path={path})"


def find_source(what: str, path: str, cache: str | Path | None = None) -> Path | None:
    """The folder that holds a model's files as they were published, or None.

    A hub name is looked for in `cache`, if given, and in Hugging Face's own.

    Raises:
        ModelError: `path` is a folder that does not exist.
    """
    folder = Path(path).expanduser()
    if is_folder(path):
        if folder.is_dir():
            return folder
        raise ModelError(
            f"{what}.path={path}: no such folder. For the built-in parts run `python -m data_prep.parts`, for "
            "llm=tiny then `python -m data_prep.parts.tiny_llm`; otherwise give a Hugging Face name or the folder of a "
            "downloaded model"
        )
    if cache is not None and (copied := Path(cache) / "models" / path).is_dir():
        return copied
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def weight_files(what: str, source: Path) -> list[str]:
    """Names of the weight files in `source`, safetensors where there are some; all of them are there.

    Raises:
        ModelError: no configuration, no weights, or not all that the index names.
    """
    if not (source / "config.json").is_file():
        raise ModelError(f"{what}: {source} has no config.json, so it is not the folder of a model")
    for single in (SAFETENSORS, BIN):
        index = source / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_index(what, index).values()))
            missing = [name for name in names if not (source / name).is_file()]
            if missing:
                raise ModelError(
                    f"{what}: {source} lacks {len(missing)} of the {len(names)} files that {index.name} names, first "
                    f"{missing[0]}: the download is not complete; fetch or copy them"
                )
            return names
        if (source / single).is_file():
            return [single]
    if loose := sorted(file.name for file in source.glob("*.safetensors")):
        return loose
    shards = sorted(file.name for file in source.glob("*.bin"))
    why = f"it has {shards[0]}, but no {BIN}.index.json" if shards else f"neither {SAFETENSORS} nor {BIN}"
    raise ModelError(f"{what}: {source} holds no weights ({why}): the download is not complete; fetch or copy them")


def _index(what: str, file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{what}: {file} is not an index of weights ({error!r}); copy it again") from error


def _sizes(source: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (source / name).stat().st_size for name in names}


def converted_folder(source: Path, cache: str | Path) -> Path:
    """Where the safetensors of a folder with `.bin` weights lie."""
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    return Path(cache) / "converted" / f"{source.resolve().name}-{place}"


def convert(what: str, source: Path, cache: str | Path) -> Path:
    """Safetensors of a folder with `.bin` weights, tensor for tensor, with its small files beside them.

    One shard is in memory at a time. The folder appears when all of it is on the disk.

    Raises:
        ModelError: a file that is damaged, that does not hold what the index says, or that holds anything but tensors.
    """
    names = weight_files(what, source)
    folder = converted_folder(source, cache)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _convert(what, source, names, temporary)
        for pattern in _SMALL:
            for file in source.glob(pattern):
                if not file.name.startswith((BIN, RECEIPT)):
                    shutil.copyfile(file, temporary / file.name)
        sums = {name: file_sha256(source / name) for name in names}
        receipt = {"from": str(source.resolve()), "source": _sizes(source, names), "sha256": sums}
        write_atomically(temporary / RECEIPT, json.dumps(receipt, indent=1))
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        sync(folder.parent)
    except OSError as error:
        raise ModelError(f"{what}: {source} cannot be converted into {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(what: str, source: Path, names: list[str], out: Path) -> None:
    from safetensors.torch import save_file

    index = source / f"{BIN}.index.json"
    expected = _index(what, index) if index.is_file() else None
    weight_map: dict[str, str] = {}
    size = 0
    for name in names:
        tensors = load_bin(what, source / name)
        if expected is not None:
            wanted = {key for key, shard in expected.items() if shard == name}
            if wanted != tensors.keys():
                odd = min(wanted ^ tensors.keys())
                raise ModelError(
                    f"{what}: {source / name} and {index.name} do not agree, first on {odd}; copy both again"
                )
        new = name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        weight_map |= dict.fromkeys(tensors, new)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(_independent(tensors), out / new, metadata={"format": "pt"})
    if len(names) > 1:
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
        (out / f"{SAFETENSORS}.index.json").write_text(text, encoding="utf-8")


def _independent(tensors: dict[str, Any]) -> dict[str, Any]:
    """Contiguous tensors that share no memory, as safetensors asks for."""
    import torch

    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        out[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return out


def load_bin(what: str, file: Path) -> dict[str, Any]:
    """The tensors of a `.bin` (or `.pt`) file by name; nothing in it is executed.

    Raises:
        ModelError: damaged, or anything but tensors in it.
    """
    import pickle

    import torch

    with file.open("rb") as stream:
        begins = stream.read(len(_POINTER))
    if begins == _POINTER:
        raise ModelError(f"{what}: {file} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
    refusal = f"{what}: {file} holds something other than tensors; refused, because loading it would run its code"
    damage = f"{what}: {file} is damaged or not complete; fetch or copy it again"
    try:
        # Only the format of torch 1.6 and later can be mapped; the older one is a bare pickle.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=begins[:2] == b"PK")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # torch words damage and refusal alike, and advises to load without the check.
        code = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL [\w.]+|Unsupported o\w+", str(error))
        raise ModelError(f"{refusal} ({code.group()})" if code else f"{damage} ({_cause(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(refusal)
    return tensors


def _cause(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def download(path: str) -> Path:
    """Fetch a model of the hub into Hugging Face's cache: its safetensors, or its `.bin` files where it has none.

    Raises:
        ModelError: no such model, no access to it, or no connection.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        listed = HfApi().list_repo_files(path)
        weights = [name for name in listed if "/" not in name and name.endswith(".safetensors")]
        weights = weights or [name for name in listed if "/" not in name and name.startswith("pytorch_model")]
        return Path(snapshot_download(path, allow_patterns=[*_SMALL, *weights], ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client's own errors, and those of the three HTTP libraries under it
        raise ModelError(f"{path} cannot be downloaded from here ({_cause(error)})") from error


def files_to_copy(path: str) -> str:
    """Which files of a hub model a machine without internet needs, in words."""
    return (
        f"config.json, generation_config.json, preprocessor_config.json, the tokenizer's files (tokenizer*, *.model, "
        f"special_tokens_map.json, vocab.json, merges.txt) and either *.safetensors* or pytorch_model*.bin*, as far as "
        f"{path} has them (there: `hf download {path}`)"
    )
