"""`python -m serve.chat run=RUN [image=FILE]`: a conversation in the terminal.

/image PATH   talk about this image instead        /add PATH   and about this one as well
/images       which images                         /drop       about none
/map          |dW| / |W| by layer and type: where the images change the language model, and how much
/merge        fold the images' weights into the model, or take them out again
/clear        forget what was said                 /quit       (or Ctrl-D)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, run_cli
from common.options import parse_options
from model.generator.placement import Site
from model.generator.weights import base_norms
from serve.options import DecodingOptions, image_files
from vlora.conversation import Conversation

_SHADES = " .:-=+*#%@"


@dataclass
class Options(DecodingOptions):
    """Keys of the command line.

    Attributes:
        image: An image file, or several separated by commas, to begin with.
    """

    image: str | None = None


def weight_map(talk: Conversation) -> dict[Site, float]:
    """|dW| / |W| of every site for the images of a conversation; empty without images or weights."""
    placement = talk.model.model.placement
    if talk.weights is None or placement is None:
        return {}
    base = base_norms(talk.model.model.llm, placement)
    return {site: norm.item() / base[site] for site, norm in talk.weights.norms().items()}


def draw_map(found: dict[Site, float]) -> str:
    """The map as text: a row per type, a column per layer, darker where the change is larger."""
    if not found:
        return "no image, or a connector that makes no weights"
    layers = sorted({site.layer for site in found})
    most = max(found.values()) or 1.0
    lines = ["layer " + " ".join(f"{layer:>3}" for layer in layers)]
    for kind in dict.fromkeys(site.type for site in found):
        row = {site.layer: value for site, value in found.items() if site.type == kind}
        shades = [_SHADES[min(len(_SHADES) - 1, int(row[la] / most * len(_SHADES)))] for la in layers if la in row]
        mean = sum(row.values()) / len(row)
        lines.append(f"{kind:<5} " + " ".join(f"{shade * 3}" for shade in shades) + f"   mean {mean:.2e}")
    return "\n".join([*lines, f"darkest: {most:.2e} of |W|"])


def command(talk: Conversation, line: str) -> str | None:
    """Carry out a line that begins with `/`; what to print, or None to end.

    Raises:
        UserError, ValueError: what was asked for cannot be done; the conversation stays as it was.
    """
    word, _, argument = line.partition(" ")
    argument = argument.strip()

    def show(images: list[Any]) -> str:
        talk.show(images)
        return f"now about: {', '.join(map(str, talk.images)) or 'no image'}"

    def clear() -> str:
        talk.clear()
        return "forgotten"

    def merge() -> str:
        talk.merge = not talk.merge
        if not talk.merge:
            talk.use_branch()
            return "taken out again, bit for bit"
        return "with the next answer" if talk.weights is not None else "as soon as there is an image"

    actions: dict[str, Callable[[], str]] = {
        "/image": lambda: show(list(image_files(argument))),
        "/add": lambda: show([*talk.images, *image_files(argument)]),
        "/images": lambda: ", ".join(map(str, talk.images)) or "no image",
        "/drop": lambda: show([]),
        "/map": lambda: draw_map(weight_map(talk)),
        "/merge": merge,
        "/clear": clear,
        "/help": lambda: str(__doc__),
    }
    if word in ("/quit", "/exit"):
        return None
    if word not in actions:
        return f"{word}: no such command; there are {', '.join(actions)}, /quit"
    if word in ("/image", "/add") and not argument:
        return f"{word} PATH"
    return actions[word]()


def say(talk: Conversation, question: str, options: Options) -> None:
    """Ask, print the answer as it comes, and the speed."""
    started = time.perf_counter()
    first = None
    for piece in talk.stream(question, **options.generation()):
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    took = time.perf_counter() - started
    speed = f"{talk.last_tokens} tokens, {talk.last_tokens / took:.1f} tokens/s"
    print(f"\n\033[2m[{speed}, first after {(first or started) - started:.2f} s]\033[0m" if sys.stdout.isatty() else "")
    if (report := talk.fresh_report()) is not None:
        print(report, file=sys.stderr)


def main() -> int:
    """Talk until the input ends."""
    options: Options = parse_options(Options, sys.argv[1:], __doc__)
    files = image_files(options.image)
    model, processor = options.open()
    typed = sys.stdin.isatty()
    with Conversation(model, processor, files, options.merge) as talk:
        print(f"{options.run}: {', '.join(map(str, files)) or 'no image yet: /image PATH'}; /help", file=sys.stderr)
        while True:
            try:
                line = input("> " if typed else "").strip()
            except EOFError:
                return 0
            if not line:
                continue
            if not typed:
                print(f"> {line}", flush=True)  # nobody has typed it: it would stand nowhere in the transcript
            try:
                if line.startswith("/"):
                    told = command(talk, line)
                    if told is None:
                        return 0
                    print(told)
                else:
                    say(talk, line, options)
            except KeyboardInterrupt:
                print("\nstopped")
            except (UserError, ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
