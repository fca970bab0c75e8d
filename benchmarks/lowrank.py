"""The low-rank op against the einsum-and-index form and against no low-rank term at all.

    python -m benchmarks.lowrank --llm FOLDER [--layers N]   a frozen HF decoder, forward + backward
    python -m benchmarks.lowrank                             single projections: SmolLM2-135M and 7B shapes
    python -m benchmarks.lowrank --predict                   bytes, FLOPs and A100 roofline time of every kernel

``--json FILE`` writes the same figures. Every comparison interleaves its variants and takes each one's median, so that
a busy machine slows all of them alike; the ratios are the result. With a CUDA device the projections run there in bf16,
on whatever backend ``auto`` picks, and the table adds achieved TFLOP/s and the error against float64.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from model.ops import lowrank_delta, lowrank_linear, lowrank_linear_group, split_perceptual
from model.ops.backend import backend_for

RANK = 64
A100_FLOPS, A100_BYTES = 312e12, 2.0e12
"""bf16 tensor-core peak and memory bandwidth (NVIDIA A100 80 GB SXM data sheet)."""


def einsum_term(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The released code's form of the term, ``a`` [S, d_in, r] already indexed out of the generator's output."""
    return torch.einsum("blr,rd->bld", torch.einsum("bld,bdr->blr", x, a), b)


def interleaved(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of what each variant returns (seconds), variants taking turns; one unmeasured turn first."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            seconds = run()
            if turn:
                taken[name].append(seconds)
    return {name: median(values) for name, values in taken.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Ratios first: overhead over no low-rank term, and low-rank time of the einsum form over ours."""
    ours, plain, einsum = (seconds[name] for name in ("ours", "plain", "einsum and index"))
    return {
        "overhead": ours / plain - 1,
        "einsum_overhead": einsum / plain - 1,
        "low_rank_speedup": (einsum - plain) / max(ours - plain, 1e-9),
        "seconds": seconds,
    }


class Placement:
    """The op in every 4th layer of a frozen HF decoder: q, k, v, o, and m beside the MLP.

    ``form`` says what the patched modules add: "plain" nothing, "einsum and index", "ours", or "ours, q,k,v grouped".
    """

    def __init__(self, layers: nn.ModuleList, samples: int) -> None:
        self.form = "plain"
        self.layers = list(layers)[3::4]
        d = layers[0].self_attn.q_proj.in_features
        self.generated = (torch.randn(samples, 5, len(self.layers), d, RANK) * 0.02).requires_grad_()
        self.b: list[dict[str, Tensor]] = []
        self.a: list[tuple[Tensor, ...]] = []
        for i, layer in enumerate(self.layers):
            attention = layer.self_attn
            modules = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj}
            self.b.append({kind: self._shared(module.out_features) for kind, module in modules.items()})
            self.b[i]["m"] = self._shared(d)
            group = [modules[kind] for kind in "qkv"]
            for kind, module in modules.items():
                module.forward = self._projection(module, kind, i, group)
            layer.mlp.forward = self._mlp(layer.mlp, i)

    def parameters(self) -> list[Tensor]:
        """What training would update."""
        return [self.generated, *(b for layer in self.b for b in layer.values())]

    def start(self, form: str) -> None:
        """Begin a forward in ``form``."""
        self.form = form
        if form.startswith("ours"):
            self.a = [split_perceptual(part) for part in self.generated.unbind(1)]

    @staticmethod
    def _shared(d_out: int) -> Tensor:
        return (torch.randn(RANK, d_out) * 0.02).requires_grad_()

    def _projection(self, module: nn.Linear, kind: str, i: int, group: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
        t, plain = "qkvom".index(kind), module.forward

        def forward(x: Tensor) -> Tensor:
            if self.form == "plain":
                return plain(x)
            if self.form == "einsum and index":
                return plain(x) + einsum_term(x, self.generated[:, t, i], self.b[i][kind])
            if self.form == "ours" or kind == "o":
                return lowrank_linear(x, module.weight, self.a[t][i], self.b[i][kind], 1.0)
            if kind == "q":
                weights, b = [p.weight for p in group], [self.b[i][k] for k in "qkv"]
                self.ready = list(lowrank_linear_group(x, weights, [self.a[j][i] for j in range(3)], b, 1.0))
            return self.ready.pop(0)

        return forward

    def _mlp(self, mlp: nn.Module, i: int) -> Callable[[Tensor], Tensor]:
        plain = mlp.forward

        def forward(x: Tensor) -> Tensor:
            if self.form == "plain":
                return plain(x)
            if self.form == "einsum and index":
                return plain(x) + einsum_term(x, self.generated[:, 4, i], self.b[i]["m"])
            return plain(x) + lowrank_delta(x, self.a[4][i], self.b[i]["m"], 1.0)

        return forward


def whole_llm(folder: Path, n_layers: int | None, rows: int, length: int, repeats: int) -> dict[str, dict]:
    """Forward + backward of the frozen decoder at ``folder``, inputs needing gradients in every variant."""
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    llm.model.layers = llm.model.layers[:n_layers]
    placement = Placement(llm.model.layers, rows)
    x = torch.randn(rows, length, llm.config.hidden_size, requires_grad=True)
    labels = torch.randint(llm.config.vocab_size, (rows, length))

    def step(form: str) -> float:
        for p in (x, *placement.parameters()):
            p.grad = None
        start = time.perf_counter()
        placement.start(form)
        llm(inputs_embeds=x, labels=labels, use_cache=False).loss.backward()
        return time.perf_counter() - start

    forms = ("plain", "einsum and index", "ours", "ours, q,k,v grouped")
    seconds = interleaved({form: (lambda form=form: step(form)) for form in forms}, repeats)
    name = f"{folder.name}, {len(llm.model.layers)} layers, {rows} x {length}"
    grouped = seconds.pop("ours, q,k,v grouped")
    return {name: ratios(seconds), f"{name}, q,k,v grouped": ratios(seconds | {"ours": grouped})}


def one_projection(samples: int, length: int, d_in: int, d_out: int, groups: int, repeats: int) -> dict:
    """One frozen projection in each of ``groups`` placed layers, whose A are one generator output [S, G, d_in, r]."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, b, generated = leaf(samples, length, d_in), leaf(RANK, d_out), leaf(samples, groups, d_in, RANK)
    w = leaf(d_out, d_in).detach()

    dy = [leaf(samples, length, d_out).detach()] * groups

    def outputs(form: str) -> list[Tensor]:
        if form == "plain":
            return [nn.functional.linear(x, w) for _ in range(groups)]
        if form == "einsum and index":
            return [nn.functional.linear(x, w) + einsum_term(x, generated[:, i], b) for i in range(groups)]
        return [lowrank_linear(x, w, a, b, 1.0) for a in split_perceptual(generated)]

    def timed(form: str, backward: bool) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        y = outputs(form)
        if backward:
            torch.autograd.backward(y, dy)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        x.grad = b.grad = generated.grad = None
        return seconds

    forms = ("plain", "einsum and index", "ours")
    found = {}
    for name, backward in (("forward", False), ("forward + backward", True)):
        variants = {form: (lambda form=form, backward=backward: timed(form, backward)) for form in forms}
        found[name] = ratios(interleaved(variants, repeats))
    flops = 2 * groups * samples * length * (d_in * d_out + RANK * (d_in + d_out))
    found["forward"]["tflops"] = flops / found["forward"]["seconds"]["ours"] / 1e12
    if device == "cuda":
        want = nn.functional.linear(x.double(), w.double()) + einsum_term(
            x.double(), generated[:, 0].double(), b.double()
        )
        for form in ("einsum and index", "ours"):
            found["forward"][f"error_{form}"] = ((outputs(form)[0].double() - want).norm() / want.norm()).item()
        found["forward"]["share_of_peak"] = found["forward"]["tflops"] * 1e12 / A100_FLOPS
    return found


def predict(samples: int, length: int, d: int = 4096, r: int = RANK) -> dict[str, dict[str, float]]:
    """Per kernel of the hybrid backend: bytes, FLOPs and the A100 roofline time, q, k, v of one 7B layer in bf16.

    Each operand is counted once, read or written; the time is the larger of bytes over bandwidth and FLOPs over peak.
    """
    tokens = samples * length
    x, a, z, b, w = (2 * n for n in (tokens * d, samples * d * r, tokens * r, r * d, d * d))
    thin, base = 2 * tokens * d * r, 2 * tokens * d * d
    kernels = {
        "shrink q,k,v": (x + 3 * a + 3 * z, 3 * thin),
        "z B into y (x3)": (3 * (z + b + x), 3 * thin),
        "base GEMM onto y (x3)": (3 * (3 * x + w), 3 * base),
        "dz = dy Bᵀ (x3)": (3 * (x + b + z), 3 * thin),
        "dB = zᵀ dy (x3)": (3 * (x + z + b), 3 * thin),
        "expand dz Aᵀ into dx": (3 * z + 3 * a + x, 3 * thin),
        "base dgrad onto dx (x3)": (3 * (3 * x + w), 3 * base),
        "factor_grad q,k,v": (x + 3 * z + 3 * a, 3 * thin),
    }
    merge_bytes, merge_flops = 32 * (2 * w + 2 * 2 * d * r), 32 * 2 * d * d * r
    kernels["merge 32 matrices"] = (merge_bytes, merge_flops)
    return {
        name: {"bytes": n, "flops": f, "roofline_us": 1e6 * max(n / A100_BYTES, f / A100_FLOPS)}
        for name, (n, f) in kernels.items()
    }


def main() -> None:
    """Print the chosen table, ratios first, and write it with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=Path, help="folder of a HF decoder to measure whole")
    parser.add_argument("--layers", type=int, help="keep only its first N layers (a multiple of 4)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    found: dict[str, dict] = {}
    if args.predict:
        for samples, length in ((96, 64), (16, 512)):
            found[f"{samples} x {length}"] = rows = predict(samples, length)
            print(f"predicted (arithmetic, not measured), A100, {samples} x {length}, rank {RANK}, 7B")
            for name, row in rows.items():
                mb, gflop, us = row["bytes"] / 1e6, row["flops"] / 1e9, row["roofline_us"]
                print(f"  {name:26s} {mb:9.1f} MB {gflop:9.1f} GFLOP {us:8.1f} us")
    else:
        torch.manual_seed(0)
        if args.llm:
            found = whole_llm(args.llm, args.layers, args.rows, args.length, args.repeats)
        else:
            shapes = {
                "SmolLM2 q, 32 x 48": (32, 48, 576, 576, 7),
                "SmolLM2 k, 32 x 48": (32, 48, 576, 192, 7),
                "7B q, 4 x 64": (4, 64, 4096, 4096, 2),
            }
            for name, shape in shapes.items():
                for phase, row in one_projection(*shape, args.repeats).items():
                    found[f"{name}, {phase}"] = row
        device = torch.device("cuda" if torch.cuda.is_available() and not args.llm else "cpu")
        where = f"{device}, backend {backend_for(device)}, {torch.get_num_threads()} threads"
        print(f"overhead over the plain layer: ours / einsum and index; low-rank time, einsum over ours  ({where})")
        for name, row in found.items():
            print(
                f"  {name:50s} {row['overhead']:7.1%} / {row['einsum_overhead']:7.1%}   {row['low_rank_speedup']:6.1f}x"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
