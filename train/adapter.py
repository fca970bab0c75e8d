"""`python -m train.adapter run=RUN image=FILE out=FOLDER`: images as standard LoRA adapters of the language model.

    python -m train.adapter run=outputs/RUN image=cat.png out=adapters/cat
    python -m train.adapter run=outputs/RUN images=photos/ out=adapters          # one adapter each, in one start
    python -m train.adapter run=outputs/RUN images=photos/ sum=true out=album    # all of them in one
    python -m train.adapter run=outputs/RUN image=cat.png out=cat format=both    # and GGUF for llama.cpp

Writes the file pair that PEFT and inference servers read, `adapter.gguf` for llama.cpp, or both. A type that LoRA has
no form for (`m`) is left out, and what that costs is measured on the images and printed, as is the loss of merging.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError, UserError, run_cli
from common.files import read_lines, read_records
from common.options import parse_options
from common.settings import setting
from model.config import MovedTo, parse_types
from model.deploy.adapter import exportable, save_adapter, save_gguf
from model.generator.weights import PerceptualWeights
from vlora.folder import find, load, part_path
from vlora.modeling import VLoRAForConditionalGeneration
from vlora.processing import VLoRAProcessor

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_QUESTION = "What does the image show?"


@dataclass
class Options:
    """Keys of the command line.

    Attributes:
        run: Run directory, exported folder or Hugging Face name, of connector `vlora`.
        image: An image file.
        images: A folder of image files, or a text file that names one per line.
        out: Folder of the adapter; of several, one folder each below it, named as the image.
        sum: Put all images into one adapter.
        types: What to write; null: everything placed that LoRA has a form for.
        format: `peft`, `gguf` or `both`.
        questions: A file with one question per line, on which the cost of what is left out is measured; null: the
            questions of the run's samples.
        llm, vision: `llm.path=...`, `vision.path=...`: where those parts are on this machine, if they have moved.
    """

    run: str = "???"
    image: str | None = setting(None, path=True)
    images: str | None = setting(None, path=True)
    out: str = setting("???", path=True)
    sum: bool = False
    types: str | None = None
    format: str = setting("peft", choices=("peft", "gguf", "both"))
    questions: str | None = None
    llm: MovedTo = field(default_factory=MovedTo)
    vision: MovedTo = field(default_factory=MovedTo)


def image_files(options: Options) -> list[Path]:
    """The images to turn into adapters, in order.

    Raises:
        ConfigError: none, one that is not there, or two that would be written to one place.
    """
    found = [] if options.image is None else [Path(options.image)]
    if options.images is not None:
        place = Path(options.images)
        if place.is_dir():
            found += sorted(file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES)
        elif place.is_file():
            found += [place.parent / line for line in read_lines("images", place)]
        else:
            raise ConfigError(f"images={place}: no such folder, nor a file that lists images")
    if missing := [file for file in found if not file.is_file()]:
        raise ConfigError(f"{missing[0]}: no such image")
    if not found:
        raise ConfigError("give image=FILE or images=FOLDER with images in it")
    names = [file.stem for file in found]
    if not options.sum and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two images are named {twice!r}: their adapters would overwrite each other; rename one")
    return found


def cost_of_leaving_out(
    model: VLoRAForConditionalGeneration,
    processor: VLoRAProcessor,
    weights: PerceptualWeights,
    types: tuple[str, ...],
    questions: list[str],
) -> str:
    """What the model loses without some of the types, as a line: KL of the answer's first token and changed choices."""
    rows = [processor.text.encode_prompt([{"role": "user", "content": question}]) for question in questions]
    inputs = processor.batch(rows, [[] for _ in rows])

    def first_token(held: PerceptualWeights | None) -> Tensor:
        logits = model(**inputs, perceptual_weights=held, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)

    full, part, none = first_token(weights), first_token(weights.of_types(types)), first_token(None)
    lost = (full.exp() * (full - part)).sum(-1)
    image = (full.exp() * (full - none)).sum(-1)
    changed = int((full.argmax(-1) != part.argmax(-1)).sum())
    return (
        f"KL {lost.mean():.4f} nats on the first token of {len(questions)} answers (without any image: "
        f"{image.mean():.4f}), {changed} of them begin with another token"
    )


def sample_questions(options: Options, folder: Path) -> list[str]:
    """Questions in the manner of the training, where they are known.

    Raises:
        UserError: no such file, or one of the run's is damaged.
    """
    if options.questions is not None:
        return read_lines("questions", Path(options.questions))
    found: list[str] = []
    for file in sorted((folder.parent / "samples").glob("*.jsonl")):
        found += [
            str(record["question"]) for record in read_records(file, ["question"], "remove it: it holds examples")
        ]
    return list(dict.fromkeys(question for question in found if question)) or [_QUESTION]


@torch.no_grad()
def main() -> int:
    """Write the adapters."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    files = image_files(options)
    wanted = None if options.types is None else parse_types(options.types)
    model, processor = load(options.run, llm=options.llm.path, vision=options.vision.path)
    if model.model.placement is None:
        name = (model.config.connector or {}).get("name")
        raise UserError(f"{options.run} has connector={name}, which makes no weights; only vlora does")
    folder = find(options.run)
    base = part_path(folder, model.config, "llm", options.llm.path)
    questions = sample_questions(options, folder)
    each = [model.perceive(processor.image_processor(file)["pixel_values"]) for file in files]
    if options.sum:
        total = each[0]
        for more in each[1:]:
            total = total + more
        each, places = [total], [Path(options.out)]
    else:
        places = [Path(options.out)] if len(files) == 1 else [Path(options.out) / file.stem for file in files]
    types = exportable(each[0]) if wanted is None else wanted
    for weights, place in zip(each, places, strict=True):
        if weights is each[0]:
            with model.merged(weights) as report:
                print(report)
        if left := [t for t in weights.placement.types if t not in types]:
            cost = cost_of_leaving_out(model, processor, weights, types, questions)
            print(f"{place.name}: left out {', '.join(left)}; measured cost: {cost}")
        place.mkdir(parents=True, exist_ok=True)
        if options.format in ("peft", "both"):
            save_adapter(place, model.model.llm, weights, 0, str(base), types)
        if options.format in ("gguf", "both"):
            save_gguf(place / "adapter.gguf", model.model.llm, weights, 0, types)
        print(f"adapter: {place}")
    return 0


if __name__ == "__main__":
    run_cli(main)
