"""Memory for what is read from files: given back to the system as soon as nobody holds it."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

LARGE = 1 << 20
"""Bytes from which a tensor has a mapping of its own: allocators keep such blocks when they are freed, and what reading
module after module may hold at its peak would then grow by them. Smaller ones are worth reusing."""


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to be read into.

    Raises:
        OSError, RuntimeError: there is no memory for it.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
