"""Work lists of ``factor_gram`` and ``factor_cross``: tiles of ``X_i^T X_j``, their splits and the reduction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._factor_inputs import cut
from ._factor_plan import (
    MAX_OFFSET,
    ColumnTable,
    Operand,
    Piece,
    is_narrow,
    is_wide,
    pair_variants,
    tile_of,
    vector_width,
)
from ._plan import WIDEST, to_device

TILES = {  # the tile of so many stacked columns and more: the fastest on an H100, where one more launched warp waits
    "native": ((0, 32), (129, 128)),
    "tf32x3": ((0, 64),),
    "ieee": ((0, 64),),
    "fp64": ((0, 16), (193, 32), (449, 64)),
}
PROGRAMS = 512  # what the splits aim at: four programs on each processor of today's largest GPUs
SPLIT = (256, 4096)  # fewest and most rows of one program: float32 chains stay short, partials stay few
PARTIAL_BYTES = 1 << 28  # partial sums of one batch of modules: some thousand programs, whose last wave counts little


@dataclass(frozen=True)
class Task:
    """One product ``X_i^T X_j`` of stacked columns; with ``j`` None the symmetric ``X_i^T X_i``."""

    i: Sequence[Piece]
    j: Sequence[Piece] | None
    precision: str


@dataclass(frozen=True)
class Variant:
    """What a launch is compiled for: tiles, types and the vector widths that the plan has proven."""

    tile_i: int
    tile_j: int
    diagonal: bool
    dtype_i: torch.dtype
    dtype_j: torch.dtype
    precision: str
    tall: tuple[int, int]
    wide: tuple[int, int]


@dataclass(frozen=True)
class Reduction:
    """Tiles of equal size that are summed over their slots: rows (slot, slots, out, rows, columns, row, column, 0)."""

    tile_i: int
    tile_j: int
    symmetric: bool
    tiles: Tensor


@dataclass(frozen=True)
class Batch:
    """Launches that share one buffer of partial sums. Work rows: (wide, i, j, k0, k1, slot, rows, columns)."""

    elements: int
    wide_sums: bool  # float64 partial sums
    launches: list[tuple[Variant, Tensor]]
    reductions: list[Reduction]


@dataclass(frozen=True)
class Product:
    """A task in the column table, with its place in the output."""

    i: Operand
    j: Operand | None
    tile_i: int
    tile_j: int
    precision: str
    out: int

    def shape(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return self.i.columns, (self.j or self.i).columns

    def tiles(self) -> list[tuple[int, int]]:
        """The tiles to compute: all, or one triangle of a symmetric product."""
        rows, columns = (-(-n // t) for n, t in zip(self.shape(), (self.tile_i, self.tile_j), strict=True))
        return [(a, b) for a in range(rows) for b in range(a if self.j is None else 0, columns)]


class GramPlan:
    """Everything a call needs beside the addresses."""

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        columns = ColumnTable()
        self.shapes: list[tuple[int, int]] = []
        products, self.numel = [], 0
        for task in tasks:
            product = _place(task, columns, self.numel)
            products.append(product)
            self.shapes.append(product.shape())
            self.numel += product.shape()[0] * product.shape()[1]
        self.addresses = columns.addresses(device)
        self.strides = to_device(columns.strides(), device)
        self.batches = _batches([p for p in products if all(p.shape())], device)

    def split(self, out: Tensor) -> list[Tensor]:
        """The matrices in the flat output."""
        if len(set(self.shapes)) == 1:  # one call instead of one per module
            return list(out.view(len(self.shapes), *self.shapes[0]).unbind())
        return cut(out, self.shapes)


def _place(task: Task, table: ColumnTable, out: int) -> Product:
    largest = _largest_tile(task)
    tile_i = tile_of(sum(p.rank for p in task.i), largest)
    i = table.add(task.i, tile_i)
    if task.j is None:
        return Product(i, None, tile_i, tile_i, task.precision, out)
    tile_j = tile_of(sum(p.rank for p in task.j), largest)
    return Product(i, table.add(task.j, tile_j, wide=i.wide), tile_i, tile_j, task.precision, out)


def _largest_tile(task: Task) -> int:
    """The best tile whose addresses and sums fit the registers: narrow loads need more addresses."""
    wide, columns = is_wide(task.i), sum(p.rank for p in task.i)
    narrow = any(is_narrow(vector_width(x, wide=wide), x[0].dtype) for x in (task.i, task.j) if x)
    best = max((least, tile) for least, tile in TILES[task.precision] if columns >= least)[1]
    return min(best, 64 if narrow else 128)


def rows_per_program(products: Sequence[Product]) -> int:
    """How many rows one program sums: a rule of the sizes alone, so that the bits do not depend on the device."""
    rows = sum(len(p.tiles()) * p.i.length for p in products)
    least, most = SPLIT
    return min(max(-(-rows // PROGRAMS // least) * least, least), most)


def _batches(products: Sequence[Product], device: torch.device) -> list[Batch]:
    split = rows_per_program(products)
    batches: list[Batch] = []
    for wide_sums in (False, True):
        drafts = [_Draft()]
        for p in products:
            if (p.precision == "fp64") != wide_sums:
                continue
            for tile in p.tiles():
                slots = max(1, -(-p.i.length // split))
                elements = slots * p.tile_i * p.tile_j
                if drafts[-1].elements and (drafts[-1].elements + elements) * (8 if wide_sums else 4) > PARTIAL_BYTES:
                    drafts.append(_Draft())
                drafts[-1].add(p, tile, slots, split)
        batches += [d.finish(wide_sums, device) for d in drafts if d.elements]
    return batches


Kind = tuple[int, int, bool, torch.dtype, torch.dtype, str]  # what a Variant begins with


class _Draft:
    """A batch in the making."""

    def __init__(self) -> None:
        self.elements = 0
        self.work: dict[Kind, dict[tuple[bool, tuple[int, int]], list]] = defaultdict(lambda: defaultdict(list))
        self.tiles: dict[tuple[int, int, bool], list] = defaultdict(list)

    def add(self, p: Product, tile: tuple[int, int], slots: int, split: int) -> None:
        j, (a, b) = p.j or p.i, tile
        symmetric = p.j is None
        row, column = a * p.tile_i, b * p.tile_j
        # tiles on the diagonal could be read once: a launch of their own would cost more than that saves
        alone = symmetric and p.shape()[0] <= p.tile_i
        kind = (p.tile_i, p.tile_j, alone, p.i.dtype, j.dtype, p.precision)
        rows = self.work[kind][p.i.wide, (p.i.vector, j.vector)]
        size = p.tile_i * p.tile_j
        self.tiles[p.tile_i, p.tile_j, symmetric].append((self.elements, slots, p.out, *p.shape(), row, column, 0))
        for s in range(slots):
            k = (s * split, min((s + 1) * split, p.i.length))
            place = (p.i.first + row, j.first + column, *k, self.elements + s * size)
            rows.append((int(p.i.wide), *place, p.shape()[0] - row, p.shape()[1] - column))
        self.elements += slots * size

    def finish(self, wide_sums: bool, device: torch.device) -> Batch:
        if self.elements > MAX_OFFSET:
            raise ValueError(
                f"{self.elements} partial sums of one module do not fit 32-bit offsets; use the torch backend"
            )
        launches = []
        for kind, groups in self.work.items():
            full = (WIDEST // kind[3].itemsize, WIDEST // kind[4].itemsize)
            for tall, wide, rows in pair_variants(groups, full):
                launches.append((Variant(*kind, tall, wide), to_device(np.array(rows, np.int32), device)))
        reductions = [Reduction(*k, to_device(np.array(t, np.int64), device)) for k, t in self.tiles.items()]
        return Batch(self.elements, wide_sums, launches, reductions)
