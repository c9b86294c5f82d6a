"""A cohort's modules in portions whose factors, and what is made of them, fit a budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from .cohort import Cohort
from .group import forms_grams
from .layer import Adapter
from .target import Target

T = TypeVar("T")
CHUNK_BYTES = 16 << 20
"""What is read and worked on together, on the CPU: bounds the memory of lazily read adapters. A larger module is a
portion of its own. How modules are put together decides when their iterations stop, so it depends on sizes only."""
HELD_BYTES = 64 << 20
"""The same of factors that lie in memory: a portion costs some milliseconds of calls, however few its modules."""
CHUNK_BYTES_GPU = 8 << 30
"""The same on a GPU."""
GRAM_PAIRS = 12
"""A module's two Grams, and what is made of them (most by ``svd``), in units of the two."""


def module_bytes(B: Sequence[Tensor], A: Sequence[Tensor]) -> int:
    """What a module takes: its factors in the one dtype that they are brought to, and its Grams."""
    numbers, ranks = sum(x.numel() for x in (*B, *A)), sum(a.shape[0] for a in A)
    factors = numbers * reduce(torch.promote_types, {a.dtype for a in A}).itemsize
    grams = GRAM_PAIRS * 2 * 8 * ranks**2 if forms_grams(ranks, B[0].shape[0] + A[0].shape[1]) else 0
    return factors + grams


def chunks(cohort: Cohort, anchor: Adapter | None, *, whole: bool) -> Iterator[list[Target]]:
    """Modules in portions that fit the budget; all at once where one solve spans them."""
    budget = HELD_BYTES if cohort.held else CHUNK_BYTES
    targets = (cohort.target(module, anchor) for module in cohort.modules)
    return iter([list(targets)]) if whole else together(targets, lambda target: _bytes_and_limit(target, budget))


def together(items: Iterable[T], bytes_and_limit: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
    """Items in portions, in their order: as many as take no more than the limit, a larger one by itself.

    A portion that is full is handed over before another item is read.
    """
    portion: list[T] = []
    size = 0
    for item in items:
        nbytes, limit = bytes_and_limit(item)
        if portion and size + nbytes > limit:
            yield portion
            portion, size = [], 0
        portion.append(item)
        del item  # else it were held while the next is read
        size += nbytes
        if size >= limit:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _bytes_and_limit(target: Target, budget: int) -> tuple[int, int]:
    """What a module takes, and what a portion may take where its factors are (on the CPU the budget)."""
    clients = len(target.B) - target.anchored
    nbytes = module_bytes(target.B[:clients], target.A[:clients])
    return nbytes, budget if target.device.type == "cpu" else CHUNK_BYTES_GPU
