"""The compiled CPU loops (``native/native.c``): found, called through ctypes, spread over threads.

The extension is optional: built with the package where there is a C compiler, and passed over where there is not or
where ``FEDGRAM_NATIVE=0``. Work is cut into jobs that depend on the shapes only, and their parts are added in order,
so that results have the same bits for every number of threads. The threads are the extension's own
(``native/spread.h``): those of Python would wait for its lock, twice for every piece of work. What the loops do with
gradients and with factors is called from ``_native_gradients``, ``_native_factors`` and ``_native_sums``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import struct
import threading
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ABI = 15  # of native.c
# Work (vector operations, about a nanosecond each) below which another thread costs more than it saves: starting one
# takes 40 us, and it may have to share its core with threads of torch that still spin; within ``spread_over_jobs`` not.
THREADED_WORK = 1 << 21
SPREAD_WORK = 1 << 18
MOST_THREADS = 64  # of a call (spread.h)
RANGES = 32  # most of one piece of work: its parts, added in order, do not depend on the number of threads
LINE = 8  # numbers of a cache line: no two threads write to one
KEPT_SCRATCH = 1 << 21  # numbers of scratch space that a thread keeps: 16 MiB

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "fedgram_spread": "pii pii pi",
    "fedgram_grad_gram": "ii pip p",
    "fedgram_grad_combine": "ii pip p",
    "fedgram_products": "ii pip p",
    "fedgram_combine": "ii pip p",
    "fedgram_lowrank_sum": "ii pip p",
    "fedgram_panels": "ii pip p",
    "fedgram_tiles": "ii pip p",
    "fedgram_collect": "ii pip p",
}
_COUNTS = {
    "fedgram_abi": "",
    "fedgram_level": "",
    "fedgram_has_tiles": "",
    "fedgram_block": "",
    "fedgram_mix_work": "",
    "fedgram_pad": "",
    "fedgram_gram_rows": "i",
    "fedgram_gram_work": "i",
    "fedgram_tile_rows": "i",
    "fedgram_tile_columns": "ii",
    "fedgram_part": "iiii",
    "fedgram_sum_work": "",
    "fedgram_sum_rows": "",
    "fedgram_sum_columns": "",
    "fedgram_panel": "",
    "fedgram_panel_group": "",
    "fedgram_panel_numbers": "ii",
    "fedgram_panel_work": "",
    "fedgram_tile_work": "",
}


class Extension:
    """A compiled extension without Python's headers: its functions by name, called through ctypes.

    Args:
        module: the extension's full name.
        calls: what its functions take, an ``i`` for every int64 and a ``p`` for every pointer; they return nothing.
        counts: the same for functions that return an int64.
        abi: what its ``fedgram_abi`` must return: one left over from other sources is not called.
    """

    def __init__(self, module: str, calls: dict[str, str], counts: dict[str, str], abi: int) -> None:
        self.module, self.calls, self.counts, self.abi = module, calls, counts, abi

    @functools.cached_property
    def missing(self) -> str | None:
        """Why it cannot be used, or None where it can."""
        if os.environ.get("FEDGRAM_NATIVE", "1") == "0":
            return "switched off by FEDGRAM_NATIVE=0"
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            return "the extension was not built: install fedgram where there is a C compiler"
        try:
            self.loaded  # noqa: B018 - loaded on first access
        except (OSError, AttributeError) as error:
            return f"the extension cannot be loaded ({error})"
        return None

    @functools.cached_property
    def loaded(self) -> ctypes.CDLL:
        """The library, loaded on first access."""
        spec = importlib.util.find_spec(self.module)
        assert spec is not None
        library = ctypes.CDLL(spec.origin)
        for name, signature in (self.calls | self.counts).items():
            function = getattr(library, name)
            function.restype = _INT if name in self.counts else None
            function.argtypes = [_INT if c == "i" else _POINTER for c in signature.replace(" ", "")]
        if (abi := library.fedgram_abi()) != self.abi:
            raise OSError(f"version {abi}, expected {self.abi}: install fedgram again")
        return library

    @functools.cached_property
    def entries(self) -> dict[str, int]:
        """The addresses of its calls, by name without ``fedgram_``."""
        return {
            name.removeprefix("fedgram_"): ctypes.cast(getattr(self.loaded, name), ctypes.c_void_p).value or 0
            for name in self.calls
        }


LOOPS = Extension("fedgram.kernels._fedgram_native", _SIGNATURES, _COUNTS, ABI)


def missing() -> str | None:
    """Why the compiled loops cannot be used, or None where they can."""
    return LOOPS.missing


def library() -> ctypes.CDLL:
    """The compiled loops."""
    return LOOPS.loaded


@functools.cache
def level() -> int:
    """The instruction set in use: 2 AVX-512, 1 AVX2, 0 whatever the compiler takes for granted."""
    return int(library().fedgram_level())


@functools.cache
def has_tiles() -> bool:
    """Whether there is a matrix unit (AMX) that the system lets this process use."""
    return bool(library().fedgram_has_tiles())


@functools.cache
def constant(name: str, *arguments: int) -> int:
    """A number that the loops were compiled with, such as ``block``, or that follows from ``arguments``."""
    return int(getattr(library(), f"fedgram_{name}")(*arguments))


def tile() -> tuple[int, int]:
    """Rows and columns of the tiles of float64 products, for the instruction set in use."""
    return constant("tile_rows", level()), constant("tile_columns", level(), 1)


def part_numbers(rows: int, columns: int, triangle: bool) -> int:
    """Numbers of a part of a float64 product, of only a triangle or of all of it, padded to whole tiles."""
    return constant("part", level(), rows, columns, triangle)


def at(numbers: np.ndarray) -> int:
    """The address of an array."""
    return numbers.__array_interface__["data"][0]


def bits(number: float) -> int:
    """A float64 as the int64 of the same bits: how a ``table`` carries it."""
    return struct.unpack("q", struct.pack("d", number))[0]


def equal_ranges(length: int, slots: int, unit: int) -> list[tuple[int, int]]:
    """At most ``slots`` equal ranges of whole units, of which the last may end early, by the shapes only."""
    step = -(-length // (slots * unit)) * unit or 1
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def table(rows: Iterable[Iterable[int]]) -> array:
    """Rows of int64, one after the other: made and found (``buffer_info``) in a fraction of an ndarray's time."""
    return array("q", list(chain.from_iterable(rows)))


_own = threading.local()


def scratch(numbers: int, name: str = "scratch") -> tuple[np.ndarray, int]:
    """At least so many uninitialised float64 numbers from the start of a cache line on, and the address of the first.

    They are this thread's own until it asks again for those of that name.
    """
    numbers += LINE
    kept = getattr(_own, name, None)
    if kept is None or len(kept[0]) < numbers:
        memory = np.empty(numbers)
        kept = memory, _padded_to_line(at(memory))
        if numbers <= KEPT_SCRATCH:
            setattr(_own, name, kept)
    return kept


def _padded_to_line(address: int) -> int:
    return -(-address // (8 * LINE)) * (8 * LINE)


_width: int | None = None  # torch's threads outside ``spread_over_jobs``, while anything is within it
_within = 0
_width_lock = threading.Lock()


@contextlib.contextmanager
def spread_over_jobs() -> Iterator[None]:
    """Give torch one thread and the loops all that it had, for work that is many independent jobs.

    Libraries that split one small decomposition over threads wait at every step for the slowest of them; where the
    other cores are busy (with reading ahead, say) that costs three to ten times the work. The setting is the
    process's, and a thread takes it over when it first asks torch for it: so every thread that leaves sets back what
    there was before the first came.
    """
    global _width, _within
    depth = getattr(_own, "depth", 0)
    with _width_lock:
        before = _one_thread()
        if _width is None:
            _width = before
        _within, _own.depth = _within + 1, depth + 1
    try:
        yield
    finally:
        with _width_lock:
            _within, _own.depth = _within - 1, depth
            torch.set_num_threads(1 if depth else _width)
            if not _within:
                _width = None


def join_spread() -> None:
    """Give torch one thread in this thread too, which works for one that is within ``spread_over_jobs``."""
    with _width_lock:
        if _width is not None:
            _one_thread()


def _one_thread() -> int:
    """Give torch one thread in this thread; the threads that it had."""
    before = torch.get_num_threads()  # this thread has then taken over the process's setting, and does not do so later
    torch.set_num_threads(1)
    return before


@contextlib.contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Give torch no more than ``count`` threads."""
    before = torch.get_num_threads()
    if before <= count:
        yield
        return
    with _width_lock:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def width_within() -> int:
    """The threads that torch had before ``spread_over_jobs``; 1 outside it."""
    return _width or 1


def threads_for(jobs: int, work: int) -> int:
    """As many threads as torch uses where ``jobs`` and ``work`` (vector operations, about) are enough for them."""
    if work < (THREADED_WORK if _width is None else SPREAD_WORK):
        return 1
    return max(1, min(_width or torch.get_num_threads(), jobs, MOST_THREADS))


def run_jobs(entry: int, jobs: array, count: int, numbers: int, work: int, *, wide: bool = True) -> None:
    """Have threads take the jobs of a table, a row each, one by one.

    Args:
        entry: what works on them, one of an extension's ``entries``.
        jobs: a ``table``.
        count: its rows.
        numbers: of float64 scratch space for every thread.
        work: of all jobs, in vector operations, about.
        wide: whether loops that exist for float32 too multiply in float64.
    """
    threads, room = threads_for(count, work), numbers // LINE * LINE + 2 * LINE
    memory, start = scratch(threads * room)  # kept until the call is over
    library().fedgram_spread(entry, level(), wide, jobs.buffer_info()[0], count, threads, start, room)
    del memory
