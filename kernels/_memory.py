"""Where tensors lie in memory: what is written must not be what is read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, UntypedStorage


def span(t: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last of ``t``, which has elements."""
    first = t.data_ptr()
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
