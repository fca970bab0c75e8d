"""Part e: norms, loss and attention by each library that is installed, and the fused GEMM's tuner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.part import Context
from benchmarks.gpu.timing import timed
from common.errors import UserError
from model.decoder.loss import linear_cross_entropy
from model.decoder.norms import resolve_kernels, use_kernels
from model.ops import tuner

KERNELS = ("transformers", "torch", "liger", "apex")


def norms_and_loss(context: Context) -> None:
    """One decoder layer of 7B shapes forward and backward, its norms and rotary embedding by each library; the loss."""
    device, dtype = context.device, context.dtype
    tokens, d, vocabulary = (32, 32, 64) if context.tiny else (6144, 4096, 32000)
    sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": 1, "num_attention_heads": d // 16}
    for name in KERNELS:
        with torch.device(device):
            llm = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=d // 16, **sizes)).to(dtype)
        try:
            use_kernels(llm, resolve_kernels(name, device.type == "cuda"))
        except (UserError, ImportError) as error:
            context.row(f"norm, {name}", {"ms": None, "why": str(error).splitlines()[0][:120]})
            continue
        norm, x = llm.model.layers[0].input_layernorm, torch.randn(tokens, d, device=device, dtype=dtype)
        x.requires_grad_()
        context.row(f"norm, {name}", timed(partial(_forward_and_backward, norm, x), device, 0.2))
    hidden = torch.randn(tokens, d, device=device, dtype=dtype, requires_grad=True)
    head = nn.Linear(d, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    context.row("loss, whole logits in fp32",
                timed(lambda: cross_entropy(head(hidden).float(), labels).backward(), device, 0.3))  # fmt: skip
    context.row(
        "loss, ours in chunks", timed(lambda: linear_cross_entropy(hidden, head.weight, labels).backward(), device, 0.3)
    )


def _forward_and_backward(module: nn.Module, x: Tensor) -> None:
    module(x).sum().backward()


def attention(context: Context) -> None:
    """Causal attention of a 7B layer forward and backward by each of torch's backends, and FlashAttention's package."""
    device, dtype = context.device, context.dtype
    shapes = [(2, 8)] if context.tiny else [(96, 64), (16, 512), (4, 2048)]
    heads, width = (2, 16) if context.tiny else (32, 128)
    backends = [SDPBackend.MATH, *([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] * (device.type == "cuda"))]
    for rows, length in shapes:
        q, k, v = (
            torch.randn(rows, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        torchs = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
        for backend in backends:
            with sdpa_kernel(backend):
                _guarded(context, f"attention {rows} x {length}, torch {backend.name.lower()}", torchs)
        if find_spec("flash_attn") is not None and device.type == "cuda":
            from flash_attn import flash_attn_func

            t = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
            _guarded(context, f"attention {rows} x {length}, flash_attn", partial(flash_attn_func, *t, causal=True))


def fused_gemm(context: Context) -> None:
    """`python -m model.ops.tuner` at the paper's shapes: the best Triton tile against cuBLAS."""
    if context.device.type != "cuda":
        context.row("tuner", {"ratio": None})
        return
    for tokens in (6144, 8192):
        for n in (4096, 1024):
            found = tuner.measure(tokens, n, 4096, 64)
            context.row(f"{tokens} x {n} x 4096, rank 64", {"ratio": found["ratio"], "tile": str(found["tile"])})


def _guarded(context: Context, name: str, attend: Callable[[], Tensor]) -> None:
    try:
        context.row(name, timed(lambda: attend().sum().backward(), context.device, 0.2))
    except RuntimeError as error:  # a backend that does not take this shape
        context.row(name, {"ms": None, "why": str(error).splitlines()[0][:120]})
