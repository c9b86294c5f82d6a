"""The compiled CPU loops of ``lowrank_sum``: in vectors, or on a matrix unit (AMX) where there is one."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ._memory import LARGE, address
from ._stacks import WIDTH
from .native_calls import LOOPS, TYPES, bits, constant, has_tiles, run_jobs, scratch, table

JOB_PANELS = 8  # of rows of a job, beside a group of panels of columns
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that hold one of a type
SIDE_BYTES = 8 << 20  # that the panels of one side take at most, unless a group is larger
TILED_RANK = {2: 16, 4: 96}  # by bytes of the output's numbers: total rank from which on the matrix unit pays
TILED_WORK = 1 << 22  # likewise, products


class _Sum(NamedTuple):
    """What all jobs of a sum share; tensors and tables are here for their memory."""

    B: array
    A: array
    ends: array  # W and the output
    c: Tensor
    R: int
    rows: int
    columns: int
    beta: int  # its bits
    stream: bool

    @property
    def factors(self) -> tuple[int, ...]:
        """As ``struct sum`` begins."""
        clients = len(self.B) // WIDTH
        return self.B.buffer_info()[0], self.A.buffer_info()[0], clients, self.R, address(self.c)

    def tile(self, row: int, column: int) -> tuple[int, ...]:
        """``struct sum``: the tile of W at (row, column)."""
        W = self.ends.buffer_info()[0]
        return (*self.factors, W, W + 8 * WIDTH, self.rows, self.columns, row, column, self.beta, self.stream)


def lowrank_sum(
    W: Tensor | None,
    B: Sequence[Tensor],
    A: Sequence[Tensor],
    c: Tensor,
    beta: float,
    out: Tensor,
    *,
    wide: bool,
    fresh: bool,
) -> None:
    """Write ``beta W + sum_u c_u B_u A_u`` to ``out``.

    In float64 products where ``wide``, else in float32 ones over 64 ranks at a time, or 512 on the matrix unit.
    ``fresh`` says that ``out`` is new memory, which is in a cache when it has been cleared.
    """
    if not out.numel():
        return
    ends = _described([out if W is None or beta == 0 else W, out], 1)
    coefficients, R = c.detach().resolve_neg().contiguous(), sum(b.shape[1] for b in B)
    scale = bits(0.0 if W is None else beta)
    stream = not fresh and out is not W and out.numel() * out.element_size() >= LARGE
    s = _Sum(_described(B, 1), _described(A, 0), ends, coefficients, R, out.shape[0], out.shape[1], scale, stream)
    if not wide and _unit_pays(out, R) and has_tiles():
        _on_matrix_unit(s, max(TERMS[a.dtype] for a in A))
    else:
        _in_vectors(s, wide=wide)


def _unit_pays(out: Tensor, R: int) -> bool:
    least = TILED_RANK[out.element_size()]
    return least <= R and out.numel() * R >= TILED_WORK


def _described(tensors: Sequence[Tensor], along: int) -> array:
    across = 1 - along
    return table([(address(t), t.shape[along], TYPES[t.dtype], t.stride(along), t.stride(across)) for t in tensors])


def _in_vectors(s: _Sum, *, wide: bool) -> None:
    rows, columns = range(0, s.rows, constant("sum_rows")), range(0, s.columns, constant("sum_columns"))
    jobs = [s.tile(*corner) for corner in product(rows, columns)]
    work = s.rows * s.columns * (s.R // 8 + 1)
    run_jobs(LOOPS.entries["lowrank_sum"], table(jobs), len(jobs), constant("sum_work"), work, wide=wide)


class _Side(NamedTuple):
    """One side's factors as panels: all ranks of some rows of B, or columns of A, as ``terms`` of bfloat16."""

    factors: tuple[int, ...]  # as ``struct panels`` begins
    length: int
    terms: int
    size: int  # bytes of a panel

    @staticmethod
    def of(s: _Sum, members: array, length: int, scale: int, terms: int) -> _Side:
        clients = len(members) // WIDTH
        size = 2 * constant("panel_numbers", s.R, terms)
        return _Side((members.buffer_info()[0], clients, s.R, scale), length, terms, size)

    def bands(self) -> list[range]:
        """Panels that are kept at a time, in whole groups."""
        group = constant("panel_group")
        count, band = -(-self.length // constant("panel")), max(1, SIDE_BYTES // (group * self.size)) * group
        return [range(first, min(count, first + band)) for first in range(0, count, band)]


class _Kept(NamedTuple):
    """Where a side's panels are, and what is known of them (``struct extent``)."""

    panels: int
    extents: int

    def of_band(self, side: _Side, band: range) -> _Kept:
        """Where panel 0 of all would be."""
        return _Kept(self.panels - band.start * side.size, self.extents - band.start * 8)


def _on_matrix_unit(s: _Sum, terms: int) -> None:
    """Bands of rows and columns of W, whose panels are kept beside each other."""
    left = _Side.of(s, s.B, s.rows, address(s.c), TERMS[torch.float32])
    right = _Side.of(s, s.A, s.columns, 0, terms)
    tall, wide = left.bands(), right.bands()
    most = len(tall[0]), len(wide[0])
    memory, at = scratch((most[0] * (left.size + 8) + most[1] * (right.size + 8)) // 8, "panels")
    lefts = _Kept(at, at + most[0] * left.size + most[1] * right.size)
    rights = _Kept(at + most[0] * left.size, lefts.extents + most[0] * 8)
    for columns in wide:
        kept = rights.of_band(right, columns)
        _pack(right, columns, kept)
        for rows in tall:
            _pack(left, rows, lefts.of_band(left, rows))
            _multiply(s, rows, columns, lefts.of_band(left, rows), kept, terms)
    del memory


def _pack(side: _Side, band: range, to: _Kept) -> None:
    group = constant("panel_group")
    starts = range(band.start, band.stop, group)
    jobs = [(*side.factors, side.length, side.terms, i, min(band.stop, i + group), *to) for i in starts]
    work = len(band) * side.size // 64
    run_jobs(LOOPS.entries["panels"], table(jobs), len(jobs), constant("panel_work"), work)


def _multiply(s: _Sum, rows: range, columns: range, left: _Kept, right: _Kept, terms: int) -> None:
    panel, group = constant("panel"), constant("panel_group")
    starts = range(rows.start, rows.stop, JOB_PANELS), range(columns.start, columns.stop, group)
    sides = terms, left.panels, right.panels, left.extents, right.extents
    jobs = [
        (*s.tile(row * panel, column * panel), min(rows.stop, row + JOB_PANELS) * panel, *sides)
        for row, column in product(*starts)
    ]
    work = len(rows) * len(columns) * panel**2 * (s.R // 32 + 1)
    run_jobs(LOOPS.entries["tiles"], table(jobs), len(jobs), constant("tile_work"), work)
