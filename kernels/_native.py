"""The compiled CPU loops (``native/native.c``): found, called through ctypes, spread over threads.

The extension is optional: built with the package where there is a C compiler, and passed over where there is not or
where ``FEDGRAM_NATIVE=0``. Work is cut into ranges of columns that depend on the shapes only, and their parts are added
in order, so that results have the same bits for every number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ABI = 2  # of native.c: an extension left over from other sources is not called
SLOTS = 32
# Work (vector operations, about) below which a range is not worth a thread of its own.
SLOT_WORK = 1 << 18
# Work below which waking threads, beside those of torch that may still spin, costs more than it saves: some 1 ms.
THREADED_WORK = 1 << 22
PART_NUMBERS = 1 << 20  # of all ranges' results together: 8 MiB, or one range
CACHE_BYTES = 1 << 19  # of one block of factors: half of an L2 cache of today's servers

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "fedgram_grad_gram": "ii ppp ii p ii pppp",
    "fedgram_grad_combine": "ii ppp ii ppp ii p",
    "fedgram_factor_products": "i pii pi iii pp",
    "fedgram_collect": "p iiiiii p",
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
    for name in ("fedgram_abi", "fedgram_level", "fedgram_block", "fedgram_pad", "fedgram_grad_gram_work"):
        getattr(library, name).restype = _INT
    library.fedgram_grad_gram_work.argtypes = [_INT]
    if (abi := library.fedgram_abi()) != ABI:
        raise OSError(f"version {abi}, expected {ABI}: install fedgram again")
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


def _each(function: Callable[..., None], jobs: Sequence[tuple[Any, ...]], work: int) -> None:
    """Call ``function(*job)`` for every job, over as many threads as torch uses where there is enough ``work``."""
    threads = min(torch.get_num_threads(), len(jobs)) if work >= THREADED_WORK else 1
    if threads <= 1:
        for job in jobs:
            function(*job)
        return
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="fedgram")
    rest = iter(list(jobs))  # next() on a list iterator is atomic: every job is taken once

    def work() -> None:
        for job in rest:
            function(*job)

    others = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _ranges(length: int, unit: int, rows: int, part: int = 0) -> list[tuple[int, int]]:
    """Equal ranges of whole blocks of ``unit`` columns, whose results have ``part`` numbers each.

    How many depends on the shapes only.
    """
    most = min(SLOTS, max(1, PART_NUMBERS // max(part, 1)))
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
    block, _ = _block()
    unit = u.detach().to(torch.float64).contiguous()
    ranges = _ranges(table.length, block, K * K // 8, rows * rows)
    slot = {first: i for i, (first, _) in enumerate(ranges)}
    parts = np.zeros((max(len(ranges), 1), rows * rows + rows + 1))
    call, scratch = _library().fedgram_grad_gram, int(_library().fedgram_grad_gram_work(K))

    def run(first: int, last: int) -> None:
        part = parts[slot[first]]
        work = np.empty(scratch)
        out = _at(part)
        call(level(), wide, *table.arguments(), unit.data_ptr(), first, last, _at(work), out, out + 8 * rows * rows,
             out + 8 * (rows * rows + rows))  # fmt: skip

    _each(run, ranges, table.length * (K * K // 8 + K))
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

    _each(run, _ranges(table.length, block, table.tasks), table.length * table.tasks)


class Stacks:
    """Modules' factors of one side as stacks of tall factors (length, r_u), described for the loops.

    Attributes:
        table: (tensors, 5) int64, for every factor its address, rank, type, and strides along and across its length.
    """

    def __init__(self, factors: Sequence[Sequence[Tensor]], *, transposed: bool) -> None:
        self.factors = factors  # keeps the memory
        long, across = int(transposed), int(not transposed)
        rows = [
            (t.data_ptr(), t.size(across), TYPES[t.dtype], t.stride(long), t.stride(across))
            for clients in factors
            for t in clients
        ]
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        self.counts = [len(clients) for clients in factors]
        self.ranks = [sum(t.size(across) for t in clients) for clients in factors]
        self.lengths = [clients[0].size(long) for clients in factors]
        start = _at(self.table)
        self.at = [start + 40 * before for before in accumulate(self.counts, initial=0)]

    def __len__(self) -> int:
        return len(self.counts)


def _columns_per_block(rows: int) -> int:
    """Columns of a block whose ``rows`` rows fit the cache: a multiple of 32, the widest pair of vectors."""
    return max(64, min(512, CACHE_BYTES // (8 * max(rows, 1)) // 32 * 32))


def factor_products(sides: Sequence[tuple[Stacks, Stacks | None]]) -> list[list[Tensor]]:
    """Per side and module ``S^T S``, or ``S^T X`` for the other stacks X; float64. All of them in one go."""
    library, pad, use = _library(), _block()[1], level()
    call, collect = library.fedgram_factor_products, library.fedgram_collect
    jobs: list[tuple[Any, ...]] = []
    results: list[list[Tensor]] = []
    finish: list[tuple[Any, ...]] = []
    work = 0
    for S, X in sides:
        results.append([])
        for l in range(len(S)):
            R, length = S.ranks[l], S.lengths[l]
            k, x = (R, None) if X is None else (X.ranks[l], X.at[l])
            shape = (_padded(R), _padded(k))
            rows = shape[0] + (0 if X is None else shape[1])
            block = _columns_per_block(rows)
            ranges = _ranges(length, block, R * k // 8, shape[0] * shape[1])
            work += length * (R * k // 8 + R)
            parts = np.zeros((max(len(ranges), 1), *shape))
            for i, (first, last) in enumerate(ranges):
                jobs.append((rows * (block + pad), S.at[l], S.counts[l], R, x, k, first, last, block, _at(parts[i])))
            if len(parts) == 1 and shape == (R, k):  # one large part is the result
                out = torch.from_numpy(parts[0])
            else:
                out = torch.empty(R, k, dtype=torch.float64)
            results[-1].append(out)
            finish.append((parts, len(parts), *shape, R, k, X is None, out.data_ptr()))

    def run(size: int, *job: Any) -> None:
        scratch = np.empty(size)
        call(use, *job[:-1], _at(scratch), job[-1])

    _each(run, jobs, work)
    for parts, *rest in finish:
        collect(_at(parts), *rest)
    return results


def factor_combine(sides: Sequence[tuple[Stacks, Sequence[Tensor], Stacks]]) -> None:
    """Write ``S P`` per side and module, for stacks S and (R, r) float64 blocks P, to the third's tall (length, r)."""
    call, pad, use = _library().fedgram_factor_combine, _block()[1], level()
    jobs: list[tuple[Any, ...]] = []
    blocks: list[np.ndarray] = []
    work = 0
    for S, P, to in sides:
        for l, p in enumerate(P):
            R, rank = p.shape
            coefficients = np.zeros((R, _padded(rank)))
            coefficients[:, :rank] = p.detach().numpy()
            blocks.append(coefficients)  # keeps the memory
            block = _columns_per_block(R)
            job = ((R + 4) * (block + pad), S.at[l], S.counts[l], R, _at(coefficients), coefficients.shape[1], to.at[l])
            jobs += [(*job, first, last, block) for first, last in _ranges(S.lengths[l], block, R * rank // 8)]
            work += S.lengths[l] * (R * rank // 8 + R)

    def run(size: int, *job: Any) -> None:
        scratch = np.empty(size)
        call(use, *job, _at(scratch))

    _each(run, jobs, work)
