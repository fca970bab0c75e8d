"""A trained model on disk: one self-describing folder, written by training and by `save_pretrained`, read by all.

FOLDER/config.json              `VLoRAConfig`: architectures, settings, where the parts' weights are
FOLDER/model.safetensors        the connector, feature statistics included
FOLDER/llm/  FOLDER/vision/     Hugging Face folders of the parts that were trained, or that were asked to be copied
FOLDER/lora/                    adapters the LLM was trained through, as peft reads them; `llm/` has them folded in
FOLDER/processor_config.json    pixels and text template; beside it the tokenizer and the chat template
FOLDER/generation_config.json   with which tokens an answer ends
FOLDER/README.md                the model card
FOLDER/checksums.json           size and checksum of the files of a run's export, verified when it is read
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from common.files import DamagedFile, damage, file_names, read_json, seal, share, write_json
from model.loading import ModelError, fingerprint
from vlora.configuration import VLoRAConfig
from vlora.processing import VLoRAProcessor

if TYPE_CHECKING:
    from vlora.modeling import VLoRAForConditionalGeneration

EXPORT = "export"
"""Where a run directory keeps its folder."""
WEIGHTS = "model.safetensors"
LORA = "lora"
CHECKSUMS = "checksums.json"
_REMEDY = "A run exports anew when its file DONE is removed and it is started again"
_PREFIX = "connector."


def find(name: str | Path, **hub: Any) -> Path:
    """The folder of a run directory, of a folder, or of a Hugging Face name (fetched); verified where it is sealed.

    Args:
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, as transformers knows them.

    Raises:
        ModelError: nothing there.
        DamagedFile: a file is not what was written.
    """
    path = Path(name).expanduser()
    for folder in (path / EXPORT, path):
        verify(folder)
        if (folder / "config.json").is_file() or (folder / "export.json").is_file():
            return folder
    if path.exists():
        what = "a run that has not finished" if (path / "config.yaml").is_file() else "no trained model"
        raise ModelError(f"{path} is {what}: it has neither config.json nor {EXPORT}/config.json")
    try:
        return Path(snapshot_download(str(name), **hub))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: neither a run directory, nor a folder, nor on the hub ({reason})") from error


def seal_folder(folder: Path) -> None:
    """Write down size and checksum of its files, the card apart, which is written again."""
    names = [name for name in file_names(folder) if name != "README.md"]
    write_json(folder / CHECKSUMS, {"files": seal(folder, names)})


def verify(folder: Path) -> None:
    """Raise a `DamagedFile` where a sealed folder is not what was written; one without checksums passes."""
    file = folder / CHECKSUMS
    if file.exists() and (problem := _damage(folder.resolve(), file.stat().st_mtime_ns)):
        raise DamagedFile(
            f"{folder} is damaged: {problem}. {_REMEDY} (if the change is meant, remove {CHECKSUMS} there)"
        )


@functools.lru_cache(maxsize=8)  # an LLM has gigabytes, and who loads a model asks more than once
def _damage(folder: Path, written: int) -> str | None:
    return damage(folder, read_json(folder / CHECKSUMS, _REMEDY)["files"])


def read_config(folder: Path) -> VLoRAConfig:
    """The configuration of a folder that `find` returned, of an earlier version too."""
    if (folder / "config.json").is_file():
        return VLoRAConfig.from_pretrained(folder)
    from vlora import legacy  # which needs OmegaConf: the folders of this version do without

    return legacy.read_config(folder)


def read_processor(folder: Path, vision: str | None = None) -> VLoRAProcessor:
    """The processor of a folder that `find` returned; see `load` for `vision`."""
    if (folder / "config.json").is_file():
        return VLoRAProcessor.from_pretrained(folder)
    from vlora import legacy

    return legacy.read_processor(folder, vision)


def read_connector(folder: Path) -> dict[str, Tensor]:
    """The connector's tensors by its own names.

    Raises:
        ModelError: no weights there.
    """
    for name, prefix in ((WEIGHTS, _PREFIX), ("connector.safetensors", "")):
        if (folder / name).is_file():
            return {key.removeprefix(prefix): value for key, value in load_file(folder / name).items()}
    raise ModelError(f"{folder}: {WEIGHTS} is missing")


def part_path(folder: Path, config: VLoRAConfig, part: str, given: str | None = None) -> str:
    """Where the weights of a part are on this machine.

    Args:
        folder: Of the trained model.
        config: Its configuration.
        part: `llm` or `vision`.
        given: A place to look in place of the one that was written down.

    Raises:
        ModelError: not there, or another model than the one that this one was trained with.
    """
    record = (config.parts or {})[part]
    places = [given] if given else [str(folder / record["path"]), record["path"]]
    local = next((place for place in places if Path(place).expanduser().is_dir()), None)
    if local is None and not given:
        local = _nearby(folder, record)
    if local is None and record["path"].startswith(("/", ".", "~")) and not given:
        raise ModelError(
            f"{folder}/config.json takes its {part} from {record['path']}, which is not here; "
            f"name its folder on this machine with {part}.path=... (fingerprint {record['fingerprint']})"
        )
    path = local or places[-1]
    found = fingerprint(path) if local else record["fingerprint"]
    if found != record["fingerprint"]:
        raise ModelError(
            f"{path} is another {part} (fingerprint {found}) than this model was trained with "
            f"({record['fingerprint']}); its weights mean nothing to another one"
        )
    return path


def _nearby(folder: Path, record: dict[str, Any]) -> str | None:
    """Where a part lies whose path was relative to another folder, or that was moved together with this one."""
    tail = [part for part in Path(record["path"]).parts if part != Path(record["path"]).anchor]
    for above in (Path(__file__).parents[1], *folder.resolve().parents):  # first the checkout, where `.cache` is
        for length in range(min(4, len(tail)), 1, -1):
            place = above.joinpath(*tail[-length:])
            if any(place.glob("*.safetensors")) and fingerprint(str(place)) == record["fingerprint"]:
                return str(place)
    return None


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    llm: str | None = None,
    vision: str | None = None,
) -> tuple[VLoRAForConditionalGeneration, VLoRAProcessor]:
    """A trained model, in evaluation mode, and its processor.

    Args:
        name: A run directory (of any version), an exported folder, or a Hugging Face name.
        dtype: `auto`: what it was trained in.
        device: Where to.
        llm, vision: Where those parts are on this machine, if not where `config.json` says.

    Raises:
        ModelError: nothing there, or parts that are missing or others.
    """
    from vlora.modeling import VLoRAForConditionalGeneration

    folder = find(name)
    model = VLoRAForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device_map=device, llm=llm, vision=vision
    )
    return model, read_processor(folder, vision)


def generation_config(processor: VLoRAProcessor) -> GenerationConfig:
    """Greedy, and ending where an answer ends."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=list(processor.text.answer_end),
        pad_token_id=processor.text.pad_id,
        bos_token_id=processor.tokenizer.bos_token_id,
    )


def write(
    folder: Path,
    config: VLoRAConfig,
    connector: dict[str, Tensor],
    processor: VLoRAProcessor | None,
    generation: GenerationConfig,
) -> None:
    """Write everything but the parts and the card into `folder`, readable for whom the umask lets read."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["VLoRAForConditionalGeneration"]
    config.save_pretrained(folder)
    tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in connector.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    generation.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    share(folder)
