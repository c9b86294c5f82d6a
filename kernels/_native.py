"""The compiled CPU loops (``native/native.c``): found, called through ctypes, spread over threads.

The extension is optional: built with the package where there is a C compiler, and passed over where there is not or
where ``FEDGRAM_NATIVE=0``. Work is cut into ranges of columns that depend on the shapes only, and their parts are added
in order, so that results have the same bits for every number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
SLOTS = 32
# Work (vector operations, about) below which a range is not worth a thread of its own.
SLOT_WORK = 1 << 18
PART_NUMBERS = 1 << 21  # of all ranges' results together: 16 MiB
CACHE_BYTES = 1 << 19  # of one block of factors: half of an L2 cache of today's servers

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "fedgram_grad_gram": "ii ppp ii p ii pppp",
    "fedgram_grad_combine": "ii ppp ii ppp ii p",
    "fedgram_factor_products": "i pii pi iii pp",
    "fedgram_factor_combine": "i pii pi p iii p",
}


@functools.cache
def missing() -> str | None:
    """Why the compiled loops cannot be used, or None where they can."""
    if os.environ.get("FEDGRAM_NATIVE", "1") == "0":
        return "switched off by FEDGRAM_NATIVE=0"
    spec = importlib.util.find_spec("fedgram.kernels._fedgram_native")
    if spec is None or spec.origin is None:
        return "the extension was not built: install fedgram where there is a C compiler"
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"the extension cannot be loaded ({error})"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("fedgram.kernels._fedgram_native")
    assert spec is not None
    library = ctypes.CDLL(spec.origin)
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [_INT if c == "i" else _POINTER for c in signature.replace(" ", "")]
    for name in ("fedgram_level", "fedgram_block", "fedgram_pad"):
        getattr(library, name).restype = _INT
    return library


@functools.cache
def level() -> int:
    """The instruction set in use: 2 AVX-512, 1 AVX2, 0 whatever the compiler takes for granted."""
    return int(_library().fedgram_level())


@functools.cache
def _block() -> tuple[int, int]:
    return int(_library().fedgram_block()), int(_library().fedgram_pad())


_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _each(function: Callable[[int, int], None], ranges: Sequence[tuple[int, int]]) -> None:
    """Call ``function(slot, thread's part)`` for every range, over as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(ranges))
    if threads <= 1:
        for first, last in ranges:
            function(first, last)
        return
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="fedgram")
    rest = iter(list(ranges))  # next() on a list iterator is atomic: every range is taken once

    def work() -> None:
        for first, last in rest:
            function(first, last)

    others = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _ranges(length: int, unit: int, rows: int, part: int = 0) -> list[tuple[int, int]]:
    """Equal ranges of whole blocks of ``unit`` columns, whose results have ``part`` numbers each.

    How many depends on the shapes only.
    """
    most = min(SLOTS, max(2, PART_NUMBERS // max(part, 1)))
    slots = max(1, min(most, length * max(rows, 1) // SLOT_WORK))
    step = -(-length // (slots * unit)) * unit if length else 1
    return [(first, min(first + step, length)) for first in range(0, length, step)]


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
        return (*map(_at, (self.address, self.start, self.type)), len(self.columns), self.tasks)


def _at(array: np.ndarray) -> int:
    return array.ctypes.data


def _padded(rows: int) -> int:
    return -(-rows // 4) * 4


def grad_gram(columns: Sequence[Sequence[Tensor]], u: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(<c, c>, <c, e_k>, <e_k, e_l>)`` about ``c = sum_k u_k g_k`` of flat gradients; wide: in float64 products."""
    table = Table(columns)
    K, rows = table.tasks, _padded(table.tasks)
    block, pad = _block()
    unit = u.detach().to(torch.float64).contiguous()
    ranges = _ranges(table.length, block, K * K // 8, rows * rows)
    slot = {first: i for i, (first, _) in enumerate(ranges)}
    parts = np.zeros((max(len(ranges), 1), rows * rows + rows + 1))
    call = _library().fedgram_grad_gram

    def run(first: int, last: int) -> None:
        part = parts[slot[first]]
        work = np.empty((rows + 1) * (block + pad))
        out = _at(part)
        call(level(), wide, *table.arguments(), unit.data_ptr(), first, last, _at(work), out, out + 8 * rows * rows,
             out + 8 * (rows * rows + rows))  # fmt: skip

    _each(run, ranges)
    total = parts[0] if len(parts) == 1 else _ordered_sum(parts)
    H = _mirrored(total[: rows * rows].reshape(rows, rows)[:K, :K])
    h = total[rows * rows : rows * rows + K].copy()
    return torch.tensor(total[-1], dtype=torch.float64), torch.from_numpy(h), torch.from_numpy(H)


def _ordered_sum(parts: np.ndarray) -> np.ndarray:
    return np.add.reduce(parts, axis=0)  # over the outer axis numpy adds row after row


def _mirrored(H: np.ndarray) -> np.ndarray:
    upper = np.triu(H)
    return upper + np.triu(H, 1).T


def grad_combine(columns: Sequence[Sequence[Tensor]], v: Tensor, out: Sequence[Tensor], wide: bool) -> None:
    """Write ``sum_k v_k g_k`` to flat tensors, one per parameter; accumulated in float64 (wide) or float32."""
    table = Table(columns)
    to = np.array([t.data_ptr() for t in out], dtype=np.int64)
    to_type = np.array([TYPES[t.dtype] for t in out], dtype=np.int64)
    coefficients = v.detach().to(torch.float64).contiguous()
    block, _ = _block()
    call = _library().fedgram_grad_combine

    def run(first: int, last: int) -> None:
        work = np.empty(2 * block)
        call(level(), wide, *table.arguments(), coefficients.data_ptr(), _at(to), _at(to_type), first, last, _at(work))

    _each(run, _ranges(table.length, block, table.tasks))


def members(columns: Sequence[Tensor]) -> np.ndarray:
    """The description of tall factors (length, r_u) that the loops read: address, rank, type, strides."""
    return np.array(
        [(t.data_ptr(), t.shape[1], TYPES[t.dtype], t.stride(0), t.stride(1)) for t in columns], dtype=np.int64
    )


def _columns_per_block(rows: int) -> int:
    """Columns of a block whose ``rows`` rows fit the cache: a multiple of 32, the widest pair of vectors."""
    return max(64, min(512, CACHE_BYTES // (8 * max(rows, 1)) // 32 * 32))


def factor_products(columns: Sequence[Tensor], other: Tensor | None = None) -> Tensor:
    """``S^T S``, or ``S^T X`` for one more tall matrix X, of the stack S of tall factors; float64."""
    table, length = members(columns), columns[0].shape[0]
    R = int(table[:, 1].sum())
    beside = None if other is None else members([other])
    k = R if other is None else other.shape[1]
    shape = (_padded(R), _padded(k))
    rows = shape[0] + (0 if other is None else shape[1])
    block, pad = _columns_per_block(rows), _block()[1]
    ranges = _ranges(length, block, R * k // 8, shape[0] * shape[1])
    slot = {first: i for i, (first, _) in enumerate(ranges)}
    parts = np.zeros((max(len(ranges), 1), *shape))
    call = _library().fedgram_factor_products
    x = None if beside is None else _at(beside)

    def run(first: int, last: int) -> None:
        work = np.empty(rows * (block + pad))
        call(level(), _at(table), len(columns), R, x, k, first, last, block, _at(work), _at(parts[slot[first]]))

    _each(run, ranges)
    total = (parts[0] if len(parts) == 1 else _ordered_sum(parts))[:R, :k]
    return torch.from_numpy(_mirrored(total) if other is None else np.ascontiguousarray(total))


def factor_combine(columns: Sequence[Tensor], P: Tensor, out: Tensor) -> None:
    """Write the tall ``S P`` of the stack S of tall factors and (R, r) float64 blocks P to ``out`` (length, r)."""
    table, target = members(columns), members([out])
    R, rank = P.shape
    coefficients = np.zeros((R, _padded(rank)))
    coefficients[:, :rank] = P.detach().numpy()
    block, pad = _columns_per_block(R), _block()[1]
    call = _library().fedgram_factor_combine

    def run(first: int, last: int) -> None:
        work = np.empty((R + 4) * (block + pad))
        call(level(), _at(table), len(columns), R, _at(coefficients), coefficients.shape[1], _at(target), first, last,
             block, _at(work))  # fmt: skip

    _each(run, _ranges(out.shape[0], block, R * rank // 8))
