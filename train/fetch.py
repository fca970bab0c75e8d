"""`python -m train.fetch [overrides]`: bring the models of an experiment onto this machine, in the form training reads.

    python -m train.fetch experiment=vlora_7b
    python -m train.fetch llm.path=/data/vicuna-7b-v1.5 vision.path=/data/clip-vit-large-patch14-336

Takes the overrides of `python -m train`. A hub name is looked for in `CACHE/models/ORG/NAME` and in Hugging Face's own
cache, and downloaded if it is in neither; `.bin` weights are turned into safetensors once, below `CACHE/converted`.
Names and shapes of all weights are then held against the model's configuration. Without internet it names the files to
copy and where to. Running it again changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common.errors import report_errors
from model.config import VisionConfig
from model.pretrained import (
    ModelError,
    convert,
    download,
    files_to_copy,
    find_source,
    is_folder,
    locate,
    weight_files,
)
from train.config import compose_overrides


def fetch(what: str, path: str, cache: Path) -> Path:
    """The folder of a model that is ready to be trained with, made so if need be.

    Args:
        what: `llm` or `vision`.
        path: Folder or hub name.
        cache: `cache_dir`.

    Raises:
        ModelError: it cannot be had, or its files are damaged.
    """
    if (built_in := _built_in(path, cache)) is not None:
        return built_in
    source = find_source(what, path, cache)
    try:
        complete = source is not None and bool(weight_files(what, source))
    except ModelError:
        if is_folder(path):
            raise
        complete = False  # partly in Hugging Face's cache: the download completes it
    if source is None or not complete:
        try:
            source = download(path)
        except ModelError as error:
            raise ModelError(
                f"{what}.path={error}. Copy {files_to_copy(path)} from a machine with internet to "
                f"{cache / 'models' / path}, and run this command again"
            ) from error
    names = weight_files(what, source)
    if names[0].endswith(".bin"):
        try:
            return locate(what, path, cache)
        except ModelError:  # not converted yet, or from other files
            print(f"{what}: turning {len(names)} .bin files of {source} into safetensors", flush=True)
            convert(what, source, cache)
    return locate(what, path, cache)


def _built_in(path: str, cache: Path) -> Path | None:
    from data_prep.parts.builtin import PARTS, ensure

    for name, part in PARTS.items():
        if Path(path) == cache / part.folder:
            return ensure(name, cache)
    return None


def verify(what: str, folder: Path, architecture: dict[str, Any] | None) -> int:
    """Hold the weights against the model's configuration: none is missing, none has another shape; reads no weights.

    Also reads the tokenizer of a language model and the image processor of an encoder.

    Args:
        what: `llm` or `vision`.
        folder: Where the files are.
        architecture: What the run's configuration expects of the model.

    Returns:
        The model's parameters.

    Raises:
        ValueError: names the file or the tensor.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM, logging

    from data_prep.store.pixels import load_preprocessor
    from model.loading import load_tokenizer, pretrained_config

    config = pretrained_config(what, str(folder), architecture)
    if what == "llm":
        load_tokenizer(str(folder))
    else:
        load_preprocessor(VisionConfig(path=str(folder)))
    logging.set_verbosity_error()  # the text half of an encoder is unexpected, and no matter
    logging.disable_progress_bar()
    try:
        model, info = (AutoModelForCausalLM if what == "llm" else AutoModel).from_pretrained(
            folder, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{what}: the weights in {folder} cannot be read ({error}); fetch or copy them again"
        ) from error
    if lost := sorted(name for name in info["missing_keys"] if not name.endswith("mask_token")):
        raise ModelError(
            f"{what}: the weights in {folder} lack {len(lost)} tensors, first {lost[0]}; wrong model, or copied in part"
        )
    if other := sorted(str(entry) for entry in info["mismatched_keys"]):
        raise ModelError(f"{what}: weights and config.json in {folder} are of two models, first at {other[0]}")
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    """Fetch every model; says for each where it is, or in one line what is wrong."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return 0
    composed = compose_overrides(sys.argv[1:])
    cache = Path(composed.cache_dir)
    failed = 0
    for what in ("llm", "vision"):
        path, architecture = composed[what].path, composed[what].architecture

        def one(what: str = what, path: str = path, architecture: Any = architecture) -> None:
            folder = fetch(what, path, cache)
            parameters = verify(what, folder, None if architecture is None else dict(architecture))
            print(f"{what}: {path} is ready, {parameters / 1e6:,.1f} M parameters, in {folder}", flush=True)

        failed = max(failed, report_errors(one))
    return failed


if __name__ == "__main__":
    sys.exit(report_errors(main))
