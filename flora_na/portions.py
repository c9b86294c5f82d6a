"""A cohort's modules in portions whose factors fit a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator

from .cohort import Cohort
from .layer import Adapter
from .target import Target

CHUNK_BYTES = 8 << 20
"""Factors that are worked on together, on the CPU: bounds the memory of lazily read adapters. A larger module is a
portion of its own. How modules are put together decides when their iterations stop, so it depends on sizes only."""
CHUNK_BYTES_GPU = 8 << 30


def chunks(cohort: Cohort, anchor: Adapter | None, *, whole: bool) -> Iterator[list[Target]]:
    """Modules in portions whose factors fit the budget; all at once where one solve spans them."""
    chunk: list[Target] = []
    size = 0
    for module in cohort.modules:
        target = cohort.target(module, anchor)
        clients = len(target.B) - target.anchored
        nbytes = sum(x.nbytes for x in (*target.B[:clients], *target.A[:clients]))
        limit = CHUNK_BYTES if target.device.type == "cpu" else CHUNK_BYTES_GPU
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
