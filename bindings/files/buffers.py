"""Memory for what is read from files: given back to the system as soon as nobody holds it."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a buffer has a mapping of its own: allocators keep such blocks when they are freed, and what reading
module after module may hold at its peak would then grow by them. Smaller ones are worth reusing."""

Buffer: TypeAlias = "np.ndarray | mmap.mmap"

_ARRAYS = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,  # NumPy has none: the same bits
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
}


def empty_buffer(nbytes: int) -> Buffer:
    """Bytes to be read into.

    Raises:
        OSError, MemoryError: there is no memory for them.
    """
    if nbytes < LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty(nbytes, np.uint8)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def tensor_in(buffer: Buffer, dtype: torch.dtype, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """The tensor whose bytes begin ``offset`` bytes into a buffer; it keeps the buffer."""
    if not prod(shape):
        return torch.empty(shape, dtype=dtype)
    # a third of what torch.frombuffer takes, which lets other threads run at every step
    tensor = torch.from_numpy(np.ndarray(shape, _ARRAYS[dtype], buffer, offset))
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Trimmer:
    """Gives freed memory that the C library keeps back to the system, now and then (glibc only).

    Blocks freed by one thread are kept for that thread: a long run that works on large portions would hold, beside the
    present one, what earlier ones have left.
    """

    def __init__(self, seconds: float = 0.25) -> None:
        self._seconds, self._last = seconds, 0.0
        self._trim = _malloc_trim()

    def __call__(self) -> None:
        """Trim, if the last time was long enough ago for it not to matter."""
        if self._trim is not None and time.monotonic() - self._last >= self._seconds:
            self._trim(0)
            self._last = time.monotonic()


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
