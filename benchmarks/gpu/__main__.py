"""`python -m benchmarks.gpu` (or `make gpu`): prove and measure everything that needs a GPU, in one process tree.

    python -m benchmarks.gpu --json gpu.json                  # one GPU of 80 GB, eight minutes at most
    python -m benchmarks.gpu --device cpu --tiny              # the same code here, under Triton's interpreter

Nothing is downloaded. Every part is a process of its own with a time limit, so a fault, a hang or a poisoned CUDA
context costs that part alone; rows are in the file as soon as they are measured. Exit code 1 when a part failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def parts() -> dict[str, tuple[int, Callable]]:
    """Name: seconds it may take, and what it runs with a `Context`; in order of value."""
    from benchmarks.gpu import correctness, libraries, merging, ops, steps

    return {
        "tests": (150, correctness.tests),
        "op": (90, ops.whole_op),
        "step-vlora": (75, partial(steps.step, form="vlora")),
        "step-mlp": (75, partial(steps.step, form="mlp")),
        "step-released": (60, partial(steps.step, form="released")),
        "step-zero2": (45, partial(steps.step, form="zero2")),
        "merge": (40, merging.merge_rates),
        "decode": (75, merging.decoding),
        "training": (90, correctness.training),
        "kernels": (60, ops.every_kernel),
        "norms": (40, libraries.norms_and_loss),
        "attention": (30, libraries.attention),
        "step-finetune": (60, partial(steps.step, form="finetune")),
        "tuner": (40, libraries.fused_gemm),
        "step-compiled": (100, partial(steps.step, form="compiled")),
        "saving": (5, steps.saving),
    }


def run_part(name: str, action: Callable, seconds: float, context: Any, method: str = "fork") -> str:
    """Run one part in a process of its own; its status. What it printed and measured before it died is kept.

    `method`: "fork", so that the imports are paid once (this process never makes a CUDA context), or "spawn".
    """
    start = time.monotonic()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context(method).Process(target=_child, args=(action, context, sender))  # type: ignore[attr-defined]
    child.start()
    sender.close()
    child.join(seconds)
    status, error = "ok", ""
    if child.is_alive():
        status, error = "timeout", f"stopped after {seconds:.0f} s"
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    elif child.exitcode != 0:
        status = "failed"
        try:
            error = receiver.recv()
        except EOFError:  # it had no time to say
            error = f"ended by signal {-child.exitcode}"
    context.results.status(name, status, time.monotonic() - start, error)
    return status


def _child(action: Callable, context: Any, sender: Connection) -> None:
    os.setpgid(0, 0)  # what it starts is ended with it
    code = 0
    try:
        action(context)
    except BaseException as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {str(error)[:300]}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a library's clean-up at exit must not hang a part that is done


def _touch(context: Any) -> None:
    """The device answers."""
    import torch

    context.row("device", {"sum": torch.ones(8, device=context.device).sum().item()})


def main() -> int:
    """Run the parts; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the least that runs every line")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts; later ones are left out")
    parser.add_argument("--commit", help="of this tree, where git cannot tell")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Or looking for a GPU would touch the driver in this process, and its forks could not use it any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    from benchmarks.gpu.part import Context
    from benchmarks.gpu.results import Results, environment, tables

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny runs the same code without one")
    known = parts()
    chosen = list(known) if args.parts is None else args.parts.split(",")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(known)}")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    results = Results(args.json)
    results.environment(environment(device, args.tiny, args.commit))
    end = time.monotonic() + 60 * args.minutes
    method = "fork"
    if run_part("device", _touch, 60, Context("device", device, args.tiny, results)) != "ok":
        method = "spawn"
    failed = []
    for name in chosen:
        limit, action = known[name]
        left = end - time.monotonic()
        if left < 3:
            results.status(name, "no time left", 0.0)
            continue
        limit *= 5 if args.device == "cpu" else 1  # there the limits only end a hang
        status = run_part(name, action, min(limit, left), Context(name, device, args.tiny, results), method)
        failed += [name] if status != "ok" else []
    print(tables(results.read()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
