"""Tensors between two forbidden memory pages: an access past either end kills the process instead of passing a test."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_PRIVATE_ANONYMOUS = 0x22


def guarded(t: Tensor, *, at_start: bool = False) -> Tensor:
    """A contiguous copy of `t` that ends (or, `at_start`, begins) exactly at a forbidden page.

    The pages are never unmapped: a test process is short.
    """
    size = max(1, t.numel() * t.element_size())
    page = mmap.PAGESIZE
    body = -(-size // page) * page
    base = _libc.mmap(None, body + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    for forbidden in (base, base + page + body):
        if _libc.mprotect(forbidden, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    address = base + page if at_start else base + page + body - size
    buffer = (ctypes.c_char * size).from_address(address)
    copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel()).view(t.shape) if t.numel() else t.clone()
    return copy.copy_(t)
