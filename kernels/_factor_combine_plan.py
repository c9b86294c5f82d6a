"""Work lists of ``factor_combine``: tiles of rows of every module's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._factor_plan import ColumnTable, Piece, is_narrow, pair_variants, tile_of
from ._plan import WIDEST, AddressTable, to_device

LARGEST_TILE = {"bf16x3": 64, "tf32x3": 32, "ieee": 32, "fp64": 32}  # columns of one program
BLOCK_C = 32  # stacked columns of one step
ALIGN = 64  # outputs start at multiples of this many elements: wide stores


def tile_k(tile_r: int, precision: str, out: torch.dtype, *, narrow: bool) -> int:
    """Rows of one program: fewer for many columns, and for an address in registers for every number."""
    if narrow or precision == "fp64":
        return 128 if tile_r == 16 else 64
    if precision == "bf16x3":
        return {16: 256 if out.itemsize == 2 else 128, 32: 128, 64: 64}[tile_r]
    return 64


@dataclass(frozen=True)
class Task:
    """One output ``X C`` (length, rank) of stacked tall columns X; stored as its transpose for the A side."""

    pieces: Sequence[Piece]
    rank: int
    scalars: bool  # C is one number per client
    transposed: bool  # the A side: coefficients and output lie as (rank, ..)
    dtype: torch.dtype
    precision: str


@dataclass(frozen=True)
class Variant:
    """What a launch is compiled for: rows and columns of a tile, types, and the vector widths that are proven."""

    tile_k: int
    tile_r: int
    scalars: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    precision: str
    tall: int
    wide: int


@dataclass(frozen=True)
class Output:
    """A module's output within the flat buffer of its type."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, int]
    stored_transposed: bool

    def of(self, buffers: dict[torch.dtype, Tensor]) -> Tensor:
        """The output as a matrix."""
        rows, columns = self.shape[::-1] if self.stored_transposed else self.shape
        # one call, not a slice and a view: there may be hundreds of modules
        stored = buffers[self.dtype].as_strided((rows, columns), (columns, 1), self.offset)
        return stored.T.contiguous() if self.stored_transposed else stored


class CombinePlan:
    """Everything a call needs beside the addresses.

    Work rows: (wide, transposed, first column, columns, k0, length, j0, rank, out, coefficients), int64.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        columns = ColumnTable()
        groups: dict[tuple, dict[tuple[bool, tuple[int, ...]], list]] = defaultdict(lambda: defaultdict(list))
        self.sizes: dict[torch.dtype, int] = defaultdict(int)
        self.outputs: list[Output] = []
        for index, t in enumerate(tasks):
            x = columns.add(t.pieces, BLOCK_C)
            length, offset = t.pieces[0].length, self.sizes[t.dtype]
            # tiles are stored the way they are read; where that is not the way the side lies, split() turns them
            shape = (t.rank, length) if t.transposed else (length, t.rank)
            self.outputs.append(Output(t.dtype, offset, shape, x.wide != t.transposed))
            self.sizes[t.dtype] += -(-length * t.rank // ALIGN) * ALIGN
            tile_r = tile_of(t.rank, LARGEST_TILE[t.precision])
            height = tile_k(tile_r, t.precision, t.dtype, narrow=is_narrow(x.vector, x.dtype))
            rows = groups[height, tile_r, t.scalars, x.dtype, t.dtype, t.precision][x.wide, (x.vector,)]
            first = (int(x.wide), int(t.transposed), x.first, x.columns)
            for k0 in range(0, length, height):
                rows += [(*first, k0, length, j0, t.rank, offset, index) for j0 in range(0, t.rank, tile_r)]
        self.addresses = columns.addresses(device)
        self.coefficients = AddressTable(np.arange(len(tasks)), np.zeros(len(tasks), np.int64), device)
        arrays = (columns.strides(), columns.clients(), columns.positions())
        self.strides, self.clients, self.positions = (to_device(a, device) for a in arrays)
        self.launches: list[tuple[Variant, Tensor]] = []
        for kind, variants in groups.items():
            for tall, wide, rows in pair_variants(variants, (WIDEST // kind[3].itemsize,)):
                if rows:
                    self.launches.append((Variant(*kind, *tall, *wide), to_device(np.array(rows, np.int64), device)))

    def split(self, buffers: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """The outputs in the flat buffers."""
        return [output.of(buffers) for output in self.outputs]
