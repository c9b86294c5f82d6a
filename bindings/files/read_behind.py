"""Files larger than the page cache should hold: what has been read is dropped from it, unless it was there before."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

PERIOD = 1 << 23
"""Bytes of a file that are dropped in one go: the cache holds them in pieces of up to some megabytes."""
MEMORY_SHARE = 1 / 4
"""Of the machine's memory: files that are more than it together are dropped, others are left for a second run."""
CACHESTAT = 451
"""The number of the system call, on every architecture; Linux 6.5 and later."""

_active = 0


@contextlib.contextmanager
def reading_once(nbytes: int) -> Iterator[None]:
    """Within the block, files of ``nbytes`` together are read from front to back for the last time.

    Left in the page cache they would push out what others have there, and every page would be a fresh one, which can
    cost a virtual machine several times the copying. Files that were cached before stay; so does everything where the
    files are small beside the memory, or where the system cannot tell (it is no Linux, or an older one).
    """
    global _active
    wanted = nbytes > MEMORY_SHARE * _memory()
    _active += wanted
    try:
        yield
    finally:
        _active -= wanted


class ReadBehind:
    """What has been read of one open file and is to leave the page cache."""

    def __init__(self) -> None:
        self._start = self._dropped = self._stop = 0
        self._cached: bool | None = None  # until it was looked at, which systems without advice never do

    def opened(self, descriptor: int) -> None:
        """Look, the first time, whether the file is cached already."""
        if self._cached is None:
            self._cached = mostly_cached(descriptor)

    def __call__(self, descriptor: int, start: int, stop: int) -> None:
        """Bytes ``start:stop`` were read."""
        if not _active or self._cached is not False:
            return
        if start != self._stop:
            self._start = self._dropped = start
        self._stop = stop
        if stop - self._dropped >= PERIOD:
            # from the start of the run on: a piece that the last time was read in part is whole now
            os.posix_fadvise(descriptor, self._start, stop - self._start, os.POSIX_FADV_DONTNEED)
            self._dropped = stop


def mostly_cached(descriptor: int) -> bool:
    """Whether the page cache holds half of a file or more; True where the system does not tell."""
    pages = (ctypes.c_uint64 * 5)()  # in the cache, dirty, being written, evicted, recently so
    try:
        system = ctypes.CDLL(None).syscall
    except (AttributeError, OSError, TypeError):
        return True
    if os.uname().sysname != "Linux" or system(CACHESTAT, descriptor, (ctypes.c_uint64 * 2)(0, 0), pages, 0):
        return True
    return 2 * pages[0] * os.sysconf("SC_PAGE_SIZE") >= os.fstat(descriptor).st_size


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
