"""Host plans of the factor kernels: the table of stacked columns and the work lists, one row per program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ._plan import WIDEST, AddressTable, power_of_two_divisor

MAX_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Piece:
    """One tensor seen as tall columns (length, rank): ``B_u``, or ``A_u^T``."""

    index: int  # in the flat list of tensors
    length: int
    rank: int
    stride_k: int  # along the length, in elements
    stride_c: int  # from column to column
    dtype: torch.dtype
    alignment: int  # power of two that divides the address, at most WIDEST

    @staticmethod
    def of(index: int, tensor: Tensor, *, transposed: bool) -> Piece:
        """Describe ``tensor``, or with ``transposed`` its transpose."""
        (length, rank), (stride_k, stride_c) = tensor.shape, tensor.stride()
        if transposed:
            length, rank, stride_k, stride_c = rank, length, stride_c, stride_k
        alignment = power_of_two_divisor(tensor.data_ptr(), WIDEST)
        if tensor.numel() and alignment < tensor.dtype.itemsize:
            raise ValueError(f"tensor {index}: its address is not a multiple of its element size")
        return Piece(index, length, rank, stride_k, stride_c, tensor.dtype, alignment)


def is_wide(pieces: Sequence[Piece]) -> bool:
    """Whether the long dimension of every piece is contiguous, so that tiles are read along it."""
    return all(p.stride_k == 1 or p.length <= 1 for p in pieces if p.rank)


def vector_width(pieces: Sequence[Piece], *, wide: bool) -> int:
    """Elements that every load may take at once: the hint on the kernels' pointers, proven here.

    Every group of ``vector_width`` neighbours, along the length (wide) or across columns (tall), starting at a
    multiple of it, is contiguous in memory and starts at a multiple of its own size in bytes.
    """
    width = WIDEST // pieces[0].dtype.itemsize
    for p in pieces:
        if not p.length:
            continue
        along, across = ((p.length, p.stride_k), (p.rank, p.stride_c))
        if not wide:
            along, across = across, along
        if along[0] > 1 and along[1] != 1:
            return 1
        for number in (p.alignment // p.dtype.itemsize, along[0], across[1] if across[0] > 1 else 0):
            width = power_of_two_divisor(number, width)
    return width


def is_narrow(vector: int, dtype: torch.dtype) -> bool:
    """Whether loads of so many numbers take less than eight bytes: then addresses take many registers."""
    return vector * dtype.itemsize < 8


@dataclass(frozen=True)
class Operand:
    """Stacked columns of one module and side in the column table."""

    first: int  # first column of the table
    columns: int
    length: int
    dtype: torch.dtype
    wide: bool
    vector: int


class ColumnTable:
    """One row per stacked column: which tensor, where in it, and its stride along the length.

    Columns are padded to whole tiles by repeating the last vector group: padding is read, never kept, so that no load
    needs a mask that would split it.
    """

    def __init__(self) -> None:
        self.source: list[np.ndarray] = []
        self.offset: list[np.ndarray] = []
        self.stride: list[np.ndarray] = []
        self.client: list[np.ndarray] = []
        self.within: list[np.ndarray] = []
        self.columns = 0

    def add(self, pieces: Sequence[Piece], tile: int, *, wide: bool | None = None) -> Operand:
        """Append the columns of ``pieces``, padded to a multiple of ``tile``."""
        wide = is_wide(pieces) if wide is None else wide
        vector = vector_width(pieces, wide=wide)
        width = sum(p.rank for p in pieces)
        operand = Operand(self.columns, width, pieces[0].length, pieces[0].dtype, wide, vector)
        if not width:
            return operand
        ranks = [p.rank for p in pieces]
        within = np.concatenate([np.arange(r) for r in ranks])
        size = pieces[0].dtype.itemsize
        columns = {
            "source": np.repeat([p.index for p in pieces], ranks),
            "offset": within * np.repeat([p.stride_c * size for p in pieces], ranks),
            "stride": np.repeat([p.stride_k if p.length > 1 else 0 for p in pieces], ranks),
            "client": np.repeat(np.arange(len(pieces)), ranks),
            "within": within,
        }
        if columns["stride"].max() > MAX_OFFSET:
            raise ValueError(f"a row stride of {columns['stride'].max()} elements does not fit 32 bits")
        group = 1 if wide else vector
        padding = width - group + np.arange(-width % tile) % group
        for name, values in columns.items():
            getattr(self, name).append(np.concatenate([values, values[padding]]))
        self.columns += width + len(padding)
        return operand

    def addresses(self, device: torch.device) -> AddressTable:
        """The table of the columns' addresses."""
        return AddressTable(_joined(self.source, np.int64), _joined(self.offset, np.int64), device)

    def strides(self) -> np.ndarray:
        """The columns' strides along the length, int32."""
        return _joined(self.stride, np.int32)

    def clients(self) -> np.ndarray:
        """Which client of its module every column belongs to, int32."""
        return _joined(self.client, np.int32)

    def positions(self) -> np.ndarray:
        """Which of its client's columns every column is, int32."""
        return _joined(self.within, np.int32)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def tile_of(columns: int, largest: int) -> int:
    """The smallest tile of 16, 32, .. ``largest`` columns that holds all, or ``largest``."""
    tile = 16
    while tile < min(columns, largest):
        tile *= 2
    return tile


Rows = list[tuple[int, ...]]
V = TypeVar("V", bound=tuple[int, ...])  # vector widths of the operands


def pair_variants(groups: Mapping[tuple[bool, V], Rows], full: V) -> Iterator[tuple[V, V, Rows]]:
    """Join work rows of tall tiles with rows of wide ones: ``(tall vectors, wide vectors, rows)`` of each launch.

    A kernel holds both ways of reading, each for one vector width: where each occurs with one width only, one launch
    does all.
    """
    talls, wides = ([(v, rows) for (w, v), rows in groups.items() if w == wide] for wide in (False, True))
    none: tuple[V, Rows] = full, []
    for (tall, tall_rows), (wide, wide_rows) in zip_longest(talls, wides, fillvalue=none):
        yield tall, wide, tall_rows + wide_rows
