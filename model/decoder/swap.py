"""Swaps a module's class for a subclass of itself, and undoes it.

Names and parameters stay as they were: base checkpoints load unchanged, ZeRO-3 sees ordinary modules, and `isinstance`
and tables by class go on to hold. What is done to a Hugging Face decoder (`injection`, `norms`, `loss`) is done this
way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def swap(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Put `mixin` in front of the class of `module`, and set `attributes` on it. `unswap` undoes both."""
    for name, value in attributes.items():
        setattr(module, name, value)
    original: Any = type(module)
    module.__class__ = _with_mixin(mixin, original)
    module.__dict__.setdefault("_swapped", []).append((original, tuple(attributes)))


def unswap(module: nn.Module, mixin: type) -> bool:
    """Give `module` the class back that it had before `swap(module, mixin)`, the last one made to it.

    Returns:
        False where the last swap was not of `mixin`; nothing is done then.
    """
    if not isinstance(module, mixin):
        return False
    original, names = module.__dict__["_swapped"][-1]
    if issubclass(original, mixin):  # another one was put in front of it
        return False
    module.__class__ = original
    for name in names:
        delattr(module, name)
    module.__dict__["_swapped"].pop()
    return True


@contextmanager
def original(modules: Iterable[nn.Module], mixin: type) -> Iterator[None]:
    """Inside the block those of `modules` whose last swap was of `mixin` have the class that they had before it."""
    swapped = [(module, type(module)) for module in modules if isinstance(module, mixin)]
    for module, cls in swapped:
        before, _ = module.__dict__["_swapped"][-1]
        module.__class__ = cls if issubclass(before, mixin) else before
    try:
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cls


@functools.cache
def _with_mixin(mixin: type, cls: Any) -> type:
    # One class per pair: torch.compile and class-keyed tables know modules of one kind by it.
    return type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), {"__module__": cls.__module__})
