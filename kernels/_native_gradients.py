"""The compiled CPU loops over gradients: the centred Gram matrix and the combination, each in one read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ._memory import address, check_memory
from .native_calls import LOOPS, RANGES, TYPES, at, constant, equal_ranges, run_jobs, table

RANGE_WORK = 1 << 18  # work below which a range of columns is not worth a thread of its own
PART_NUMBERS = 1 << 20  # of all ranges' results together: 8 MiB, or one range


class Table:
    """K gradients, parameter by parameter, as the loops read them; ``columns[p][k]`` are flat views."""

    def __init__(self, columns: Sequence[Sequence[Tensor]]) -> None:
        self.columns = columns  # keeps the memory
        self.tasks = len(columns[0])
        self.address = np.array([[t.data_ptr() for t in ts] for ts in columns], dtype=np.int64)
        if not self.address.all():
            check_memory(chain.from_iterable(columns))
        self.start = np.concatenate([[0], np.cumsum([ts[0].numel() for ts in columns])]).astype(np.int64)
        self.type = np.array([TYPES[ts[0].dtype] for ts in columns], dtype=np.int64)

    @property
    def length(self) -> int:
        """Columns of all parameters."""
        return int(self.start[-1])

    def arguments(self) -> tuple[int, int, int, int, int]:
        """Addresses of the three arrays, and the two counts."""
        return at(self.address), at(self.start), at(self.type), len(self.columns), self.tasks


def _ranges(length: int, rows: int, part: int = 0) -> list[tuple[int, int]]:
    """Equal ranges of whole blocks of columns, whose results have ``part`` numbers each."""
    most = min(RANGES, max(1, PART_NUMBERS // max(part, 1)))
    return equal_ranges(length, max(1, min(most, length * max(rows, 1) // RANGE_WORK)), constant("block"))


def grad_gram(columns: Sequence[Sequence[Tensor]], u: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(<c, c>, <c, e_k>, <e_k, e_l>)`` about ``c = sum_k u_k g_k`` of flat gradients; wide: in float64 products."""
    given = Table(columns)
    K, rows = given.tasks, constant("gram_rows", given.tasks)
    weights = u.detach().to(torch.float64).contiguous()
    ranges = _ranges(given.length, K * K // 8, rows * rows)
    parts = np.zeros((max(len(ranges), 1), rows, rows))
    out, size, common = at(parts), 8 * rows * rows, (*given.arguments(), address(weights))
    jobs = table([(*common, *bounds, out + size * i) for i, bounds in enumerate(ranges)])
    work = given.length * (K * K // 8 + K)
    run_jobs(LOOPS.entries["grad_gram"], jobs, len(ranges), constant("gram_work", K), work, wide=wide)
    # over the outer axis numpy adds part after part
    upper = np.triu(parts[0] if len(parts) == 1 else np.add.reduce(parts, axis=0))
    whole = torch.from_numpy(upper + np.triu(upper, 1).T)
    return whole[K, K].clone(), whole[K, :K].clone(), whole[:K, :K].contiguous()


def grad_combine(columns: Sequence[Sequence[Tensor]], v: Tensor, out: Sequence[Tensor], wide: bool) -> None:
    """Write ``sum_k v_k g_k`` to flat tensors, one per parameter; accumulated in float64 (wide) or float32."""
    given = Table(columns)
    to, to_type = array("q", map(address, out)), array("q", [TYPES[t.dtype] for t in out])
    coefficients = v.detach().to(torch.float64).contiguous()
    written = address(coefficients), to.buffer_info()[0], to_type.buffer_info()[0]
    ranges = _ranges(given.length, given.tasks)
    jobs = table([(*given.arguments(), *written, *bounds) for bounds in ranges])
    work = given.length * given.tasks
    run_jobs(LOOPS.entries["grad_combine"], jobs, len(ranges), constant("mix_work"), work, wide=wide)
