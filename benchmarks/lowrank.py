"""The low-rank op against the einsum-and-index form and against no low-rank term at all.

    python -m benchmarks.lowrank --llm FOLDER [--layers N]   a frozen HF decoder, forward + backward, as in pretraining
    python -m benchmarks.lowrank                             single projections and q,k,v: SmolLM2-135M and 7B shapes
    python -m benchmarks.lowrank --predict                   bytes, FLOPs and A100 roofline time of every kernel
    python -m benchmarks.lowrank --kernels                   the same measured, on a GPU

`--json FILE` writes the same figures. The variants take turns and each turn gives one ratio, of which the median is
reported, so that a busy machine slows both sides alike. On the CPU one thread runs, as in a rank of the demo, with the
demo's allocator settings, and CPU seconds are counted: what other processes take from the clock is not. With a CUDA
device everything runs there in bf16 on whatever backend `auto` picks, and the table adds achieved TFLOP/s and the
error against float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import A100_FLOPS, measure, predict
from model.config import GeneratorConfig
from model.decoder.injection import inject
from model.generator.placement import Placement, Site, decoder_layers, place
from model.generator.weights import PerceptualWeights
from model.ops import lowrank_linear, lowrank_linear_group, split_perceptual
from model.ops.backend import backend_for
from train.process.allocator import keep_freed_memory

RANK = 64
TYPES = ("q", "k", "v", "o", "m")


def einsum_term(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The released code's form of the term, `a` [S, d_in, r] already indexed out of the generator's output."""
    return torch.einsum("blr,rd->bld", torch.einsum("bld,bdr->blr", x, a), b)


def seconds(run: Callable[[], object]) -> float:
    """What `run` takes: on the GPU wall time, on the CPU the time this process is given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(variants: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn by variant, the variants taking turns; one unmeasured turn first."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, run in variants.items():
            value = seconds(run)
            if turn:
                taken[name].append(value)
    return taken


def ratios(taken: dict[str, list[float]], form: str = "ours") -> dict[str, Any]:
    """Ratios first: overhead over no low-rank term, and low-rank time of the einsum form over ours."""
    plain, ours, einsum = (taken[name] for name in ("plain", form, "einsum and index"))

    def extra(values: list[float]) -> float:
        return median(value / base - 1 for value, base in zip(values, plain, strict=True))

    return {
        "overhead": extra(ours),
        "einsum_overhead": extra(einsum),
        "low_rank_speedup": extra(einsum) / max(extra(ours), 1e-9),
        "seconds": {name: median(values) for name, values in taken.items()},
    }


@contextmanager
def einsum_and_index(llm: nn.Module, placement: Placement, generated: Tensor, b: dict[Site, Tensor]) -> Iterator[None]:
    """Inside the block the placed modules add the term as the released code does.

    `generated` is the generator's whole output [S, types, layers, d, r], indexed at every use.
    """

    def forward(x: Tensor, plain: Callable, site: Site) -> Tensor:
        a = generated[:, TYPES.index(site.type), placement.layers.index(site.layer)]
        return plain(x) + einsum_term(x, a, b[site])

    modules = {site: decoder_layers(llm)[site.layer].get_submodule(site.module) for site in placement.sites}
    for site, module in modules.items():
        module.forward = functools.partial(forward, plain=module.forward, site=site)
    yield
    for module in modules.values():
        del module.forward


def whole_llm(folder: Path, n_layers: int | None, rows: int, length: int, turns: int) -> dict[str, dict]:
    """Forward + backward through the frozen decoder at `folder`, q, k, v, o and m in every 4th layer.

    The inputs need gradients in every variant. The head is left out: it would only dilute the ratio. "ours" is the real
    injection, as in training; "einsum and index" is the released code's form in the same places.
    """
    from transformers import AutoModelForCausalLM

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False).to(device)
    llm.model.layers = llm.model.layers[:n_layers]
    layers = list(range(3, len(llm.model.layers), 4))
    placement = place(llm, GeneratorConfig(rank=RANK, types=list(TYPES), every=None, layers=layers))
    d = llm.config.hidden_size

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.02).to(dtype).requires_grad_()

    inject(llm, placement)
    whole = leaf(rows, len(TYPES), len(layers), d, RANK)
    generated = {t: leaf(rows, len(layers), d, RANK) for t in TYPES}  # as the generator's heads hand it out
    b = {site: leaf(RANK, site.d_out) for site in placement.sites}
    x = leaf(rows, length, d)
    seed = torch.randn(rows, length, d, device=device, dtype=dtype)
    leaves = [x, whole, *generated.values(), *b.values()]

    def weights() -> PerceptualWeights:
        a: dict[Site, Tensor] = {}
        for t in TYPES:
            a |= zip(placement.of_type(t), split_perceptual(generated[t]), strict=True)
        return PerceptualWeights(placement, a, b, 1.0)

    def step(form: str) -> None:
        for tensor in leaves:
            tensor.grad = None
        given = {"perceptual_weights": weights()} if form == "ours" else {}
        with einsum_and_index(llm, placement, whole, b) if form == "einsum and index" else nullcontext():
            hidden = llm.get_decoder()(inputs_embeds=x, use_cache=False, **given).last_hidden_state
        hidden.backward(seed)

    forms = ("plain", "einsum and index", "ours")
    taken = interleaved({form: functools.partial(step, form) for form in forms}, turns)
    return {f"{folder.name}, {len(llm.model.layers)} layers, {rows} x {length}": ratios(taken)}


def one_projection(samples: int, length: int, d_in: int, d_out: tuple[int, ...], layers: int, turns: int) -> dict:
    """Frozen projections of one x (`d_out` each) in `layers` placed layers, A out of one [S, layers, d_in, r].

    With several projections "ours" is one op per layer and "ours, one by one" an op each.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, b = leaf(samples, length, d_in), [leaf(RANK, n) for n in d_out]
    w = [leaf(n, d_in).detach() for n in d_out]
    generated = [leaf(samples, layers, d_in, RANK) for _ in d_out]
    dy = [leaf(samples, length, n).detach() for n in d_out] * layers

    def outputs(form: str) -> list[Tensor]:
        if form == "plain":
            return [nn.functional.linear(x, w_g) for _ in range(layers) for w_g in w]
        if form == "einsum and index":
            return [
                nn.functional.linear(x, w_g) + einsum_term(x, a[:, i], b_g)
                for i in range(layers)
                for w_g, a, b_g in zip(w, generated, b, strict=True)
            ]
        factors = zip(*(split_perceptual(a) for a in generated), strict=True)
        if form == "ours":
            return [y for a in factors for y in lowrank_linear_group(x, w, a, b, 1.0)]
        return [lowrank_linear(x, *args, 1.0) for a in factors for args in zip(w, a, b, strict=True)]

    def step(form: str, backward: bool) -> None:
        y = outputs(form)
        if backward:
            torch.autograd.backward(y, dy)
            x.grad = None
            for tensor in (*b, *generated):
                tensor.grad = None

    forms = ["plain", "einsum and index", "ours", *["ours, one by one"] * (len(d_out) > 1)]
    found = {}
    for name, backward in (("forward", False), ("forward + backward", True)):
        taken = interleaved({f: functools.partial(step, f, backward) for f in forms}, turns)
        found[name] = ratios(taken)
        if len(d_out) > 1:
            found[f"{name}, one by one"] = ratios(taken, "ours, one by one")
        flops = (
            2 * layers * samples * length * sum(d_in * n + RANK * (d_in + n) for n in d_out) * (3 if backward else 1)
        )
        found[name]["tflops"] = flops / found[name]["seconds"]["ours"] / 1e12
    if device == "cuda":
        wide = x.double(), w[0].double(), generated[0][:, 0].double(), b[0].double()
        want = nn.functional.linear(wide[0], wide[1]) + einsum_term(wide[0], *wide[2:])
        for form in ("einsum and index", "ours"):
            found["forward"][f"error_{form}"] = ((outputs(form)[0].double() - want).norm() / want.norm()).item()
        found["forward"]["share_of_peak"] = found["forward"]["tflops"] * 1e12 / A100_FLOPS
    return found


def _print_prediction(found: dict[str, dict], samples: int, length: int) -> None:
    print(f"predicted (arithmetic, not measured), A100, {samples} x {length}, rank {RANK}, q, k, v of one 7B layer")
    for phase, ratio in found["overhead"].items():
        print(f"  low-rank over base linears, {phase}: {ratio:.1%}")
    for name, row in found["kernels"].items():
        mb, gflop, us = row["bytes"] / 1e6, row["flops"] / 1e9, row["roofline_us"]
        print(f"  {name:26s} {mb:9.1f} MB {gflop:9.1f} GFLOP {us:8.1f} us")


def _print_kernels(found: dict[str, dict], samples: int, length: int) -> None:
    print(f"measured, {torch.cuda.get_device_name()}, {samples} x {length}, rank {RANK}, q, k, v of one 7B layer")
    for name, row in found.items():
        if name != "device":
            shares = f"{row['share_of_roofline']:6.1%} of roofline {row['share_of_cublas']:6.1%} of cuBLAS"
            rates = f"{row['tflops']:7.1f} TFLOP/s {row['gb_per_s']:7.0f} GB/s {row['us']:8.1f} us"
            print(f"  {name:26s} {shares} {rates}, error {row['error']:.1e}")


def main() -> None:
    """Print the chosen table, ratios first, and write it with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, help="folder of a HF decoder to measure whole")
    parser.add_argument("--layers", type=int, help="keep only its first N layers (a multiple of 4)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--predict", action="store_true", help="only arithmetic")
    parser.add_argument("--kernels", action="store_true", help="time every kernel; needs a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    found: dict[str, dict] = {}
    if args.kernels and not torch.cuda.is_available():
        parser.error("--kernels needs a CUDA device; --predict prints the arithmetic without one")
    if args.predict or args.kernels:
        for shape in ((96, 64), (16, 512)):
            found["{} x {}".format(*shape)] = row = predict(*shape)
            _print_prediction(row, *shape)
            if args.kernels:
                from triton.testing import do_bench

                row["measured"] = measure(*shape, do_bench, device="cuda")
                _print_kernels(row["measured"], *shape)
        if not args.kernels:
            print("not measured on a GPU")
    else:
        torch.manual_seed(0)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            keep_freed_memory()
            torch.set_num_threads(1)
        if args.llm:
            found = whole_llm(args.llm, args.layers, args.rows, args.length, args.turns)
        else:
            shapes = {
                "SmolLM2 q, 32 x 48": (32, 48, 576, (576,), 7),
                "SmolLM2 q,k,v, 32 x 48": (32, 48, 576, (576, 192, 192), 7),
                "7B q, 4 x 64": (4, 64, 4096, (4096,), 2),
            }
            for name, sizes in shapes.items():
                for phase, row in one_projection(*sizes, args.turns).items():
                    found[f"{name}, {phase}"] = row
        device = torch.device("cpu" if on_cpu else "cuda")
        where = f"{device}, backend {backend_for(device)}" + (", 1 thread, CPU seconds" if on_cpu else "")
        print(f"overhead over the plain layer: ours / einsum and index; low-rank time, einsum over ours  ({where})")
        for name, row in found.items():
            ours, einsum = row["overhead"], row["einsum_overhead"]
            print(f"  {name:50s} {ours:7.1%} / {einsum:7.1%}   {row['low_rank_speedup']:6.1f}x")
        if on_cpu:
            print("not measured on a GPU")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
