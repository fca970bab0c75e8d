"""The command `vlora`: `vlora train ...` is `python -m train ...`, and so on for every command.

`vlora` alone lists them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

from common.errors import run_cli

COMMANDS = {
    "parts": ("data_prep.parts.__main__", "convert the built-in models and data"),
    "fetch": ("train.fetch", "bring the models of an experiment onto this machine"),
    "prepare": ("data_prep.__main__", "prepare a data set: source=NAME"),
    "train": ("train.__main__", "one stage: [overrides]"),
    "evaluate": ("train.evaluate", "answers and accuracy: run=RUN"),
    "report": ("train.report", "a page about any run: run=RUN[,RUN...]"),
    "benchmark": ("train.benchmark", "the field's benchmarks, by lmms-eval: run=RUN suite=paper"),
    "adapter": ("train.adapter", "one image's weights as a LoRA adapter: run=RUN image=FILE out=FOLDER"),
    "official": ("train.official", "the authors' checkpoints in, and ours out"),
    "chain": ("train.chain", "prepare, pretrain, finetune and evaluate on a cluster: FOLDER"),
    "preflight": ("train.preflight", "is this machine fit for the job?"),
    "sweep-report": ("train.sweep_report", "table and plots of a sweep: FOLDER"),
    "demo": ("train.demo", "the whole pipeline on real parts"),
    "ask": ("serve.ask", "ask a trained model about an image"),
    "chat": ("serve.chat", "talk with a trained model about an image"),
    "serve": ("serve.__main__", "serve a trained model over HTTP"),
}
"""Module and what it does, by name."""


def main() -> None:
    """Run the command that the first argument names."""
    there = {name: job for name, (module, job) in COMMANDS.items() if _is_there(module)}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in there:
        lines = [f"  vlora {name:<14}{job}" for name, job in there.items()]
        print("\n".join(["commands, each with --help or described in README.md:", *lines]))
        sys.exit(0 if name in ("-h", "--help") else 2)
    module = importlib.import_module(COMMANDS[name][0])
    sys.argv = [f"vlora {name}", *sys.argv[2:]]
    run_cli(module.main)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.split(".")[0]) is not None and importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    main()
