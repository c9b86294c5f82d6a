"""The compiled CPU loops over gradients: the centred Gram matrix and the combination, each in one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ._native import TYPES, at, constant, level, library, scratch, together

RANGES = 32
RANGE_WORK = 1 << 18  # work below which a range of columns is not worth a thread of its own
PART_NUMBERS = 1 << 20  # of all ranges' results together: 8 MiB, or one range


class Table:
    """K gradients, parameter by parameter, as the loops read them; ``columns[p][k]`` are flat views."""

    def __init__(self, columns: Sequence[Sequence[Tensor]]) -> None:
        self.columns = columns  # keeps the memory
        self.tasks = len(columns[0])
        self.address = np.array([[t.data_ptr() for t in ts] for ts in columns], dtype=np.int64)
        self.start = np.concatenate([[0], np.cumsum([ts[0].numel() for ts in columns])]).astype(np.int64)
        self.type = np.array([TYPES[ts[0].dtype] for ts in columns], dtype=np.int64)

    @property
    def length(self) -> int:
        """Columns of all parameters."""
        return int(self.start[-1])

    def arguments(self) -> tuple[int, int, int, int, int]:
        """Addresses of the three arrays, and the two counts."""
        return (*map(at, (self.address, self.start, self.type)), len(self.columns), self.tasks)


def _ranges(length: int, rows: int, part: int = 0) -> list[tuple[int, int]]:
    """Equal ranges of whole blocks of columns, whose results have ``part`` numbers each, by the shapes only."""
    unit = constant("block")
    most = min(RANGES, max(1, PART_NUMBERS // max(part, 1)))
    slots = max(1, min(most, length * max(rows, 1) // RANGE_WORK))
    step = -(-length // (slots * unit)) * unit if length else 1
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _each(function: Callable[[int, int, int], None], ranges: Sequence[tuple[int, int]], work: int) -> None:
    """Call ``function(i, first, last)`` for every range ``i``, each taken by one of the threads."""
    rest = iter([(i, *bounds) for i, bounds in enumerate(ranges)])  # next() on a list iterator is atomic

    def run() -> None:
        for job in rest:
            function(*job)

    together(run, len(ranges), work)


def grad_gram(columns: Sequence[Sequence[Tensor]], u: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(<c, c>, <c, e_k>, <e_k, e_l>)`` about ``c = sum_k u_k g_k`` of flat gradients; wide: in float64 products."""
    table = Table(columns)
    K, rows = table.tasks, constant("gram_rows", table.tasks)
    weights = u.detach().to(torch.float64).contiguous()
    ranges = _ranges(table.length, K * K // 8, rows * rows)
    parts = np.zeros((max(len(ranges), 1), rows, rows))
    call, arguments, numbers = library().fedgram_grad_gram, table.arguments(), constant("gram_work", K)

    def run(i: int, first: int, last: int) -> None:
        memory, start = scratch(numbers)  # kept until the call is over
        call(level(), wide, *arguments, weights.data_ptr(), first, last, start, at(parts[i]))
        del memory

    _each(run, ranges, table.length * (K * K // 8 + K))
    # over the outer axis numpy adds part after part
    upper = np.triu(parts[0] if len(parts) == 1 else np.add.reduce(parts, axis=0))
    whole = torch.from_numpy(upper + np.triu(upper, 1).T)
    return whole[K, K].clone(), whole[K, :K].clone(), whole[:K, :K].contiguous()


def grad_combine(columns: Sequence[Sequence[Tensor]], v: Tensor, out: Sequence[Tensor], wide: bool) -> None:
    """Write ``sum_k v_k g_k`` to flat tensors, one per parameter; accumulated in float64 (wide) or float32."""
    table = Table(columns)
    to = np.array([t.data_ptr() for t in out], dtype=np.int64)
    to_type = np.array([TYPES[t.dtype] for t in out], dtype=np.int64)
    coefficients = v.detach().to(torch.float64).contiguous()
    call, arguments, numbers = library().fedgram_grad_combine, table.arguments(), 2 * constant("block")

    def run(_: int, first: int, last: int) -> None:
        memory, start = scratch(numbers)  # kept until the call is over
        call(level(), wide, *arguments, coefficients.data_ptr(), at(to), at(to_type), first, last, start)
        del memory

    _each(run, _ranges(table.length, table.tasks), table.length * table.tasks)
