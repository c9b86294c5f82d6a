"""Where tensors lie in memory: it must be there, and what is written must not be what is read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, UntypedStorage

LARGE_PAGE = 2 << 20
LARGE = 32 << 20
"""Bytes from which on an allocator fetches new memory from the system for every tensor."""
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


def address(t: Tensor) -> int:
    """Where ``t`` begins.

    Raises:
        ValueError: as ``check_memory``.
    """
    where = t.data_ptr()
    if not where:
        check_memory([t])
    return where


def check_memory(tensors: Iterable[Tensor], name: Callable[[int], str] | None = None) -> None:
    """Raise ValueError for a tensor that has elements and no memory: its address, zero, would be followed.

    Args:
        tensors: to be looked at, once one of their addresses is known to be zero.
        name: of the tensor of that number, for the message.
    """
    for i, t in enumerate(tensors):
        _check(t, i, name)


def check_addresses(tensors: Sequence[Tensor], addresses: np.ndarray, name: Callable[[int], str] | None = None) -> None:
    """``check_memory`` of tensors whose addresses are known: looks at those at zero, which may be empty ones."""
    if not addresses.all():
        for i in np.flatnonzero(addresses == 0).tolist():
            _check(tensors[i], i, name)


def _check(t: Tensor, i: int, name: Callable[[int], str] | None) -> None:
    if t.numel() and not t.data_ptr() and not t.is_meta:  # those lie on another device, which is told elsewhere
        what = f"{'' if name is None else name(i) + ': '}a {type(t).__name__} of shape {tuple(t.shape)}"
        raise ValueError(
            f"{what} has no memory of its own: freed (a sharded parameter's, say), or made of others; "
            "pass a plain tensor (of a DTensor, its full_tensor())"
        )


def ask_for_large_pages(t: Tensor) -> None:
    """Of the system, for a new tensor of a CPU: first uses of 4 kB each take as long as what is computed.

    It is a wish: systems without large pages, or that give them anyway, go on as they would.
    """
    if _LARGE_PAGES is not None and t.nbytes >= LARGE:
        first = -(-t.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        nbytes = (t.data_ptr() + t.nbytes - first) // LARGE_PAGE * LARGE_PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), _LARGE_PAGES)


def span(t: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of ``t``, which has elements; none of one without memory (fake)."""
    first = t.data_ptr()
    if not first:
        return 0, 0
    if t.is_contiguous():
        return first, first + t.nbytes
    extent = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return first, first + extent * t.element_size()


def meets(t: Tensor, first: int, end: int) -> bool:
    """Whether the memory that ``t`` spans meets that from ``first`` up to ``end``."""
    if not t.numel():
        return False
    own, last = span(t)
    return own < end and first < last


def overlaps_itself(t: Tensor) -> bool:
    """Whether ``t`` is expanded, so that elements share memory."""
    return not t.is_contiguous() and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))


def storages(tensors: Iterable[Tensor]) -> Iterable[int]:
    """Where the tensors' storages begin; passes in C, for there may be thousands."""
    return map(UntypedStorage.data_ptr, map(Tensor.untyped_storage, tensors))
