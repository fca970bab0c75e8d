"""Fused kernels for RMSNorm, rotary embedding and the head's loss, chosen once per model by `llm.kernels`.

Norms are swapped for subclasses of themselves (`model.decoder.swap`). Which formula a decoder's norm computes (Llama's
`x w`, Gemma's `x (1 + w)`) is found out by running a small one, not by its name; a norm that computes neither is left
alone.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from common.errors import UserError
from model.config import KERNELS
from model.decoder.swap import swap
from model.generator.placement import decoder_layers

log = logging.getLogger(__name__)

_EPS_NAMES = ("variance_epsilon", "eps")


def check_kernels(name: str) -> None:
    """Check that the packages behind `llm.kernels=name` are installed.

    Raises:
        UserError: one is not.
    """
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "llm.kernels=liger: liger_kernel is not installed; pip install liger-kernel, or set llm.kernels=auto"
        )
    if name == "apex":
        require_nvidia_apex("llm.kernels=apex", "llm.kernels=auto")


def require_nvidia_apex(setting: str, instead: str) -> None:
    """Check that `apex` is NVIDIA's, for a `setting` that needs it; `instead` is what to set otherwise.

    Raises:
        UserError: apex is missing, or is the unrelated PyPI package of that name.
    """
    how = f"build NVIDIA apex from its repository (README, 'NVIDIA apex'), or set {instead}"
    if importlib.util.find_spec("apex") is None:
        raise UserError(f"{setting}: apex is not installed; {how}")
    if not _has_apex():
        raise UserError(
            f"{setting}: the installed package `apex` is an unrelated one from PyPI, not NVIDIA apex; "
            f"`pip uninstall apex`, then {how}"
        )


def resolve_kernels(name: str, cuda: bool) -> str:
    """What `auto` means here: on a GPU Liger, else apex, else torch; on a CPU transformers' own modules.

    `torch.nn.functional.rms_norm` is one kernel on a GPU, but on a CPU the very same sequence of operations.

    Raises:
        UserError: kernels for GPUs only on a machine without one, or not installed.
    """
    if name not in KERNELS:
        raise UserError(f"llm.kernels={name}: choose one of {', '.join(KERNELS)}")
    check_kernels(name)
    if name in ("liger", "apex") and not cuda:
        raise UserError(f"llm.kernels={name} runs on NVIDIA GPUs only and none is visible; set llm.kernels=auto")
    if name != "auto":
        return name
    if not cuda:
        return "transformers"
    return "liger" if importlib.util.find_spec("liger_kernel") else "apex" if _has_apex() else "torch"


def use_kernels(llm: nn.Module, kernels: str) -> dict[str, int]:
    """Swap `llm`'s norms, rotary embedding and loss for those of `kernels` (a resolved name); logs what it did.

    The rotary embedding is a function of the decoder's module in transformers: it is replaced there, for all models
    of that family in this process.

    Returns:
        How many `norms` were swapped, and whether (0 or 1) `rotary` and `loss` were.
    """
    swapped = {"norms": 0, "rotary": 0, "loss": 0}
    if kernels != "transformers":
        for module in llm.modules():
            kind: Any = type(module)
            offset = norm_offset(kind) if "RMSNorm" in kind.__name__ else None
            if offset is not None:
                swap(module, _KernelNorm, _kernel=functools.partial(_NORMS[kernels], offset=offset, eps=_eps(module)))
                swapped["norms"] += 1
    if kernels == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        swapped["rotary"] = int(_use_liger_rotary(llm))
        llm.get_output_embeddings()._fused_loss = functools.partial(
            liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32
        )
        swapped["loss"] = 1
    log.info("kernels: %s (%d norms, rotary %d, loss %d)", kernels, *swapped.values())
    return swapped


@functools.cache
def norm_offset(cls: Any) -> float | None:
    """0 where a norm of this class computes x / rms(x) * w, 1 where it multiplies by 1 + w, None for anything else."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            norm = cls(8, eps=1e-2)
            weight, x = torch.randn(8), torch.randn(4, 8)
            norm.weight.data = weight
            with torch.no_grad():
                out = norm(x)
    except (TypeError, AttributeError, RuntimeError):  # other arguments, other parameters
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(out, rms_norm(x, (8,), weight + offset, 1e-2), rtol=1e-5, atol=1e-6):
            return offset
    return None


class _KernelNorm(nn.Module):
    """Mixin in front of a norm's class."""

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x, self.weight)


def _torch_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    if offset:  # as Gemma: all in fp32, for 1 + w would lose w in bf16
        return rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)
    return rms_norm(x, weight.shape, weight, eps)


def _liger_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # Not in place: where a residual follows the norm (Gemma 2) its gradient is still needed.
    return liger_rms_norm(x, weight, eps, offset, "gemma" if offset else "llama", False)


def _apex_norm(x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    # `memory_efficient`: the backward pass computes the input back from the output, which the next layer keeps anyway.
    if offset:
        return fused_rms_norm_affine(x.float(), weight.float() + offset, weight.shape, eps, memory_efficient=True).to(
            x.dtype
        )
    return fused_rms_norm_affine(x, weight, weight.shape, eps, memory_efficient=True)


_NORMS: dict[str, Callable[..., Tensor]] = {"torch": _torch_norm, "liger": _liger_norm, "apex": _apex_norm}


def _use_liger_rotary(llm: nn.Module) -> bool:
    """Whether the decoder's rotary function is Llama's, and so was replaced."""
    from liger_kernel.transformers.functional import liger_rope

    module: Any = sys.modules[type(decoder_layers(llm)[0]).__module__]
    rotary = getattr(module, "apply_rotary_pos_emb", None)
    if rotary is None or rotary is liger_rope:
        return rotary is not None
    generator = torch.Generator().manual_seed(0)
    q, k, half = (torch.randn(*shape, generator=generator) for shape in ((2, 2, 3, 8), (2, 1, 3, 8), (2, 3, 4)))
    cos, sin = torch.cat([half.cos()] * 2, -1), torch.cat([half.sin()] * 2, -1)

    def llama(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[:, None] + turned * sin[:, None]

    same = all(torch.allclose(a, llama(x), atol=1e-6) for a, x in zip(rotary(q, k, cos, sin), (q, k), strict=True))
    if same:
        module.apply_rotary_pos_emb = liger_rope
    return same


def _eps(norm: nn.Module) -> float:
    return next(getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name))


def _has_apex() -> bool:
    # The unrelated package of that name has no such part.
    return importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None
