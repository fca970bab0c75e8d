"""`python -m train.official`: the authors' released checkpoints in, and ours out for their code.

    python -m train.official checkpoint=llava_vlora_7b out=outputs/released
    python -m train.official checkpoint=FOLDER_WITH_mm_projector.bin out=outputs/released llm=lmsys/vicuna-7b-v1.5
    python -m train.official run=outputs/RUN out=FOLDER

In: makes a run directory, which `train.evaluate run=` scores and `train stage=finetune init_from=` trains on. Out:
writes `mm_projector.bin` (tensors bit for bit) and, where the run trained its LLM, the whole `llava_vlora` folder. A
full folder holds no image processor and an `mm_projector.bin` no language model: those come from `vision=` and `llm=`.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import UserError, run_cli
from common.files import read_json
from common.options import parse_options
from common.settings import setting
from data_prep.store.pixels import load_preprocessor
from model import official
from model.config import VisionConfig
from model.loading import fingerprint, load_tokenizer, pretrained_config
from model.pretrained import locate
from train import config as configuration
from train.config import DTYPES, ConfigError, RunConfig
from train.engine.export import FOLDER, trained_part
from train.process.run_files import RunDir
from vlora import folder as folders
from vlora.chat_templates import chat_template
from vlora.configuration import VLoRAConfig
from vlora.processing import VLoRAImageProcessor, VLoRAProcessor

RECORD = "official.json"
"""In an imported run: the released configuration as it came."""
_TOKENIZER = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


@dataclass
class Options:
    """Keys of the command line; give `checkpoint` or `run`.

    Attributes:
        checkpoint: Folder of a released checkpoint to import.
        run: Run directory to export.
        out: Run directory to make, or folder to write.
        llm: Language model of an `mm_projector.bin`, folder or hub name.
        vision: Encoder; null: the checkpoint's `mm_vision_tower`.
        compat: `official`: the imported run also answers with the release's text, image slot and positions, as the
            published figures were made (`data.compat`); `none`: as ours do.
        cache_dir: As in a run's configuration.
    """

    checkpoint: str | None = None
    run: str | None = None
    out: str = "???"
    llm: str | None = None
    vision: str | None = None
    compat: str = setting("none", choices=("none", "official"))
    cache_dir: str = ".cache"


def import_checkpoint(options: Options) -> Path:
    """Make a run directory of a released checkpoint.

    Raises:
        ValueError, UserError: the checkpoint, or a model it needs, is not what it should be.
    """
    folder, out = Path(str(options.checkpoint)), _empty(options.out)
    theirs, tensors = official.read_folder(folder)
    connector, language, tower = official.split_checkpoint(tensors)
    state = official.import_connector(connector, theirs)
    vision_path = options.vision or theirs.get("mm_vision_tower")
    if vision_path is None:
        raise ConfigError(f"{folder / 'config.json'} names no mm_vision_tower; give vision=FOLDER_OR_HUB_NAME")
    encoder = locate("vision", vision_path, options.cache_dir)
    if not language and options.llm is None:
        raise ConfigError(
            f"{folder} holds no language model; give llm=FOLDER_OR_HUB_NAME of the one it was trained with"
        )

    writing = out.with_name(f".{out.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    export = writing / FOLDER
    export.mkdir(parents=True)
    if language:
        _write_llm(folder, theirs, language, export / "llm")
    if tower:
        _write_vision(encoder, tower, export / "vision")
    config = _configuration(theirs, options)
    config.run_dir = str(out)
    given = {
        "llm": None if language else locate("llm", str(options.llm), options.cache_dir),
        "vision": None if tower else encoder,
    }
    config.llm.path = str(out / FOLDER / "llm") if language else str(options.llm)
    config.vision.path = str(out / FOLDER / "vision") if tower else vision_path
    configuration.save(config, RunDir(writing).config)
    parts = {}
    for name, place in given.items():
        path = name if place is None else str(place.resolve())
        parts[name] = {"path": path, "fingerprint": fingerprint(str(place or export / name)), "base": None}
    _write_export(export, config, parts, {name: place or export / name for name, place in given.items()}, state)
    (writing / RECORD).write_text(json.dumps(theirs, indent=1), encoding="utf-8")
    RunDir(writing).done.write_text(f"imported from {folder}\n", encoding="utf-8")
    if out.exists():
        out.rmdir()
    writing.replace(out)
    return out


def _write_export(
    export: Path, config: RunConfig, parts: dict[str, Any], places: dict[str, Path], state: dict[str, Tensor]
) -> None:
    """What a finished run leaves (`train.engine.export`), but for the model card."""
    tokenizer = load_tokenizer(str(places["llm"]))
    architectures = {name: pretrained_config(name, str(place), None) for name, place in places.items()}
    dtype = str(DTYPES[config.engine.precision]).removeprefix("torch.")
    described = VLoRAConfig.of(config.model, parts, dtype, architectures["llm"], architectures["vision"])
    pixels = load_preprocessor(replace(config.vision, path=str(places["vision"])))
    template = config.data.template
    images = VLoRAImageProcessor.of(pixels)
    processor = VLoRAProcessor(images, tokenizer, template, chat_template(template, tokenizer))
    folders.write(export, described, state, processor, folders.generation_config(processor))


def _configuration(theirs: dict[str, Any], options: Options) -> RunConfig:
    """The paper's configuration with the checkpoint's sizes."""
    config = configuration.resolve(
        configuration.compose_overrides(["experiment=vlora_7b", "recipe=vicuna_7b/finetune"])
    )
    vision = replace(
        config.vision,
        layer=theirs.get("mm_vision_select_layer", -2),
        keep_cls=theirs.get("mm_vision_select_feature", "patch") == "cls_patch",
        image_mode="pad" if theirs.get("image_aspect_ratio") == "pad" else "crop",
        architecture=None,
    )
    return replace(
        config,
        llm=replace(config.llm, architecture=None),
        vision=vision,
        data=replace(config.data, compat=options.compat),
        generator=official.generator_config(theirs),
        cache_dir=options.cache_dir,
    )


def _write_llm(source: Path, theirs: dict[str, Any], tensors: dict[str, Tensor], out: Path) -> None:
    out.mkdir()
    _save(tensors, out / "model.safetensors")
    ours = {k: v for k, v in theirs.items() if not k.startswith(("vlora_", "mm_", "tune_", "freeze_mm", "use_mm"))}
    ours |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    for name in ("weights_sep", "skip_layers", "image_aspect_ratio", "_name_or_path"):
        ours.pop(name, None)
    (out / "config.json").write_text(json.dumps(ours, indent=1), encoding="utf-8")
    for pattern in _TOKENIZER:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)
    load_tokenizer(str(out))


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def _write_vision(encoder: Path, tower: dict[str, Tensor], out: Path) -> None:
    out.mkdir()
    _save(tower, out / "model.safetensors")
    pretrained_config("vision", str(encoder), None).save_pretrained(out)
    shutil.copyfile(encoder / "preprocessor_config.json", out / "preprocessor_config.json")


def export_run(options: Options) -> Path:
    """Write a run's export for the released code.

    Raises:
        ValueError, UserError: no export, or a generator that their code cannot express.
    """
    run, out = Path(str(options.run)), _empty(options.out)
    config = configuration.load(RunDir(run).config)
    if config.connector.name != "vlora":
        raise ConfigError(f"{run} has connector={config.connector.name}; only vlora has a released form")
    imported = read_json(run / RECORD, "import it again") if (run / RECORD).is_file() else {}
    llm_folder = trained_part(run, "llm")
    llm = pretrained_config("llm", str(llm_folder or config.llm.path), None)
    state = folders.read_connector(folders.find(run, local_files_only=True))
    keys = state["generator.keys.pos_embed"], state["generator.keys.visual_proj.weight"]
    fields = official.official_config(
        config.generator, llm.num_hidden_layers, llm.hidden_size, keys[0].shape[0], keys[1].shape[1]
    )
    widths = {name.split(".")[4] for name in state if ".heads." in name}
    if widths != {str(llm.hidden_size)} or llm.num_key_value_heads != llm.num_attention_heads:
        raise UserError(f"the released code knows one width, but {config.llm.path} has grouped or unequal projections")
    written = {**imported, **llm.to_dict(), **_vision_fields(config.vision), **fields}
    written |= {"model_type": "llava_vlora", "architectures": ["LlavaVLoRALlamaForCausalLM"]}
    projector = official.export_connector(state, fields)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(projector, out / "mm_projector.bin")
    (out / "config.json").write_text(json.dumps(written, indent=1, default=str), encoding="utf-8")
    if llm_folder is not None:
        tensors = dict(projector)
        for file in sorted(llm_folder.glob("*.safetensors")):
            tensors |= load_file(file)
        tower = RunDir(run).export / "vision" / "model.safetensors"
        tensors |= {official.TOWER + name: t for name, t in load_file(tower).items()} if tower.is_file() else {}
        _save(tensors, out / "model.safetensors")
        for pattern in _TOKENIZER:
            for file in llm_folder.glob(pattern):
                shutil.copyfile(file, out / file.name)
    return out


def _empty(folder: str) -> Path:
    """A folder to write into."""
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is not an empty folder; choose another")
    return out


def _vision_fields(vision: VisionConfig) -> dict[str, Any]:
    return {
        "mm_vision_tower": vision.path,
        "mm_vision_select_layer": vision.layer,
        "mm_vision_select_feature": "cls_patch" if vision.keep_cls else "patch",
        "image_aspect_ratio": "pad" if vision.image_mode == "pad" else "square",
    }


def main() -> int:
    """Import or export."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    if (options.checkpoint is None) == (options.run is None):
        raise ConfigError("give checkpoint=FOLDER to import or run=RUN_DIR to export, one of the two")
    if options.run is not None:
        print(f"exported to {export_run(options)}")
        return 0
    out = import_checkpoint(options)
    config = configuration.read(RunDir(out).config)
    print(f"imported into {out}: python -m train.evaluate run={out} split=FOLDER_OF_A_PREPARED_SPLIT")
    print(f"to train on: python -m train stage=finetune init_from={out} llm.path={config.llm.path}")
    return 0


if __name__ == "__main__":
    run_cli(main)
