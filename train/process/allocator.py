"""glibc's memory allocator on CPU ranks."""

import ctypes

# malloc.h: M_MMAP_MAX=0 (all from the heap), M_TRIM_THRESHOLD=-1 (never back to the kernel), M_TOP_PAD (grow in steps).
_MALLOPT = {-4: 0, -1: -1, -2: 1 << 26}


def keep_freed_memory() -> None:
    """Have glibc keep the large blocks that this process frees, until `return_freed_memory`.

    It would hand every large tensor back to the kernel and fault its pages in again at the next step: a fifth of a step
    on CPU. Where there is no glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def return_freed_memory() -> None:
    """Hand the kernel what glibc keeps: once in a while, or batches of other sizes scatter it over ever more pages."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
