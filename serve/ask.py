"""`python -m serve.ask run=RUN image=FILE question="..."`: answers about images, encoded once.

    python -m serve.ask run=outputs/RUN image=cat.png question="what animal is it?"
    python -m serve.ask run=outputs/RUN image=a.png,b.png questions=questions.txt --json
    cat questions.txt | python -m serve.ask run=outputs/RUN image=cat.png questions=-

Every question is asked on its own; for a conversation see `python -m serve.chat`. `run` may also be an exported folder
or a Hugging Face name.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, run_cli
from common.files import read_lines
from common.options import parse_options
from model.generator.weights import PerceptualWeights
from serve.options import DecodingOptions, image_files
from vlora.conversation import Conversation


@dataclass
class Options(DecodingOptions):
    """Keys of the command line.

    Attributes:
        image: An image file, or several separated by commas, which are seen together; null: a question without.
        question: What to ask.
        questions: A file with one question per line; `-`: standard input.
        weights: Weights that an earlier `save` wrote, in place of images.
        save: Write the images' weights to this safetensors file.
        json: Print one JSON object in place of the answers (also `--json`).
    """

    image: str | None = None
    question: str | None = None
    questions: str | None = None
    weights: str | None = None
    save: str | None = None
    json: bool = False


def read_questions(options: Options) -> list[str]:
    """What is to be asked.

    Raises:
        ConfigError, UserError: nothing, or no such file.
    """
    found = [] if options.question is None else [options.question]
    if options.questions == "-":
        found += sys.stdin.read().splitlines()
    elif options.questions is not None:
        found += read_lines("questions", Path(options.questions))
    found = [question.strip() for question in found if question.strip()]
    if not found and options.save is None:
        raise ConfigError('give question="..." or questions=FILE')
    return found


def main() -> int:
    """Answer."""
    options: Options = parse_options(Options, [a.replace("--json", "json=true") for a in sys.argv[1:]], __doc__)
    files, questions = image_files(options.image), read_questions(options)
    if files and options.weights:
        raise ConfigError("give image= or weights=, not both")
    if options.save is not None and (Path(options.save).is_dir() or not Path(options.save).parent.is_dir()):
        raise ConfigError(f"save={options.save}: give a file in a folder that is there")
    model, processor = options.open()
    started = time.perf_counter()
    with Conversation(model, processor, files, options.merge) as talk:
        if options.weights is not None:
            talk.use(PerceptualWeights.load(options.weights).to(model.device, model.dtype))
        encoding = time.perf_counter() - started
        if options.save is not None:
            if talk.weights is None:
                raise ConfigError("save= needs images, and a model with connector vlora")
            talk.weights.save(options.save)
        generation = options.generation()
        answers: list[dict[str, Any]] = []
        for question in questions:
            talk.clear()
            started = time.perf_counter()
            text = talk.ask(question, **generation)
            answers.append({"question": question, "answer": text, "seconds": time.perf_counter() - started})
            if not options.json:
                print(text, flush=True)
        if talk.report is not None:
            print(talk.report, file=sys.stderr)
    if options.json:
        seen = [str(file) for file in files]
        print(
            json.dumps({"run": options.run, "images": seen, "encode_seconds": encoding, "answers": answers}, indent=1)
        )
    return 0


if __name__ == "__main__":
    run_cli(main)
