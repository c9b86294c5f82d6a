"""Work lists of the gradient kernels: which columns of which tensors each program reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._grad_inputs import Gradients, GradLayout, memory_order
from ._plan import WIDEST, AddressTable, to_device

CHUNK = 2048  # columns of one entry of a work list
LARGEST_TILE = 64  # tasks of one product
SEGMENT = 1 << 12  # chunks whose centre is kept at a time when there are several tiles: 32 MiB


@dataclass(frozen=True)
class Group:
    """Parameters that one launch handles: of one type, all aligned for wide loads or none."""

    dtype: torch.dtype
    wide: bool
    chunks: Tensor  # int64 (n, 3): parameter, first column, columns; on the device


def column_chunks(parameters: list[int], numels: tuple[int, ...], size: int = CHUNK) -> np.ndarray:
    """Rows (parameter, first column, columns), int64, that cover the parameters in order."""
    which = np.asarray(parameters, dtype=np.int64)
    columns = np.asarray([numels[p] for p in parameters], dtype=np.int64)
    counts = -(-columns // size)
    ends = np.cumsum(counts)
    ordinal = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    start = ordinal * size
    return np.stack([np.repeat(which, counts), start, np.minimum(size, np.repeat(columns, counts) - start)], 1)


def groups(layout: GradLayout, aligned: np.ndarray, device: torch.device) -> list[Group]:
    """The launches that cover all parameters; ``aligned`` (P,) says which of them all tasks hold aligned."""
    keys = sorted({(str(t), bool(a)) for t, a in zip(layout.dtypes, aligned, strict=True)}, reverse=True)
    found = []
    for name, wide in keys:
        members = [p for p, t in enumerate(layout.dtypes) if str(t) == name and bool(aligned[p]) == wide]
        chunks = column_chunks(members, layout.numels)
        if len(chunks):
            found.append(Group(layout.dtypes[members[0]], wide, to_device(chunks, device)))
    return found


def scattered(gradients: Gradients) -> list[int]:
    """Parameters whose tensors have no common order of columns in memory: they are copied before a launch."""
    return [p for p, tensors in enumerate(zip(*gradients, strict=True)) if memory_order(tensors) is None]


def gathered(gradients: Gradients, parameters: list[int]) -> Gradients:
    """The gradients with contiguous copies of these parameters, where they are not contiguous already."""
    if not parameters:
        return gradients
    copied = set(parameters)
    return [[t.contiguous() if p in copied else t for p, t in enumerate(g)] for g in gradients]


def padded_table(tasks: int, parameters: int, width: int, device: torch.device) -> AddressTable:
    """Addresses (P, width) by parameter and task, 0 beyond the last task.

    Made from pointers task by task with a 0 at their end (see ``with_null``).
    """
    k, p = np.arange(width)[None, :], np.arange(parameters)[:, None]
    source = np.where(k < tasks, k * parameters + p, tasks * parameters)
    return AddressTable(source, np.zeros_like(source), device)


def with_null(pointers: np.ndarray) -> np.ndarray:
    """The pointers and a 0, which padding refers to."""
    return np.append(pointers, 0)


def aligned_parameters(lists: Sequence[Sequence[Tensor]], pointers: np.ndarray, copied: Sequence[int]) -> np.ndarray:
    """(P,) whether all tensors that a launch reads start where a widest load may: fresh copies do.

    Of the ``copied`` parameters only what is not contiguous is copied; the rest is read where it lies.
    """
    aligned = pointers.reshape(len(lists), -1) % WIDEST == 0
    for p in copied:
        aligned[:, p] |= [not tensors[p].is_contiguous() for tensors in lists]
    return aligned.all(0)
