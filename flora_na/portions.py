"""A cohort's modules in portions whose factors, and what is made of them, fit a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from .cohort import Cohort
from .group import forms_grams
from .layer import Adapter
from .target import Target

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
    held = all(isinstance(adapter.modules, dict) for adapter in cohort.adapters)
    budget = HELD_BYTES if held else CHUNK_BYTES
    chunk: list[Target] = []
    size = 0
    for module in cohort.modules:
        target = cohort.target(module, anchor)
        nbytes, limit = _bytes_and_limit(target, budget)
        if chunk and not whole and size + nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(target)
        size += nbytes
        if not whole and size >= limit:  # before another module is read
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes_and_limit(target: Target, budget: int) -> tuple[int, int]:
    """What a module takes, and what a portion may take where its factors are (on the CPU the budget)."""
    clients = len(target.B) - target.anchored
    nbytes = module_bytes(target.B[:clients], target.A[:clients])
    return nbytes, budget if target.device.type == "cpu" else CHUNK_BYTES_GPU
