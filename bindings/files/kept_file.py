"""Files that stay open between reads, as many as may be: opening one costs as much as reading 100 kB."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from .buffers import Buffer
from .documents import filed_errors, open_regular
from .read_behind import ReadBehind

MOST = 128
"""Files that are open at a time, at most."""

_order: OrderedDict[int, None] = OrderedDict()
_open: WeakValueDictionary[int, KeptFile] = WeakValueDictionary()
_guard = threading.Lock()


class KeptFile:
    """A regular file, opened when it is first read; the system is told that it is read from front to back.

    One thread at a time reads it. It is closed when many others are opened, and opened anew when it is read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._behind = ReadBehind()

    def acquire(self) -> int:
        """The open file, for this thread until it calls ``release``.

        Raises:
            ValueError, OSError: as ``open_regular``.
        """
        self._lock.acquire()
        try:
            if self._descriptor is None:
                self._reopen()
        except BaseException:
            self._lock.release()
            raise
        assert self._descriptor is not None
        return self._descriptor

    def read_into(self, buffer: Buffer, start: int) -> bool:
        """Between ``acquire`` and ``release``: as the function of this name."""
        assert self._descriptor is not None
        whole = read_into(self._descriptor, buffer, start)
        self._behind(self._descriptor, start, start + len(buffer))
        return whole

    def release(self) -> None:
        """Let others read the file, or close it."""
        self._lock.release()

    def _reopen(self) -> None:
        with open_regular(self._path) as file, filed_errors(self._path):
            self._descriptor = os.dup(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._behind.opened(self._descriptor)
        _close_others(self)

    def try_close(self) -> bool:
        """Close the file unless a thread is reading it; whether that was done."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._close()
        finally:
            self._lock.release()
        return True

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self._close()


def read_into(descriptor: int, buffer: Buffer, start: int) -> bool:
    """Fill a buffer of bytes with the bytes of a file from ``start`` on; False where the file ends before."""
    part = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    while part.nbytes:
        count = _read_some(descriptor, part, start)
        if not count:
            return False
        if count == part.nbytes:
            break
        part, start = part[count:], start + count
    return True


def _read_some(descriptor: int, part: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, (part,), start)
    os.lseek(descriptor, start, os.SEEK_SET)
    data = os.read(descriptor, len(part))
    part[: len(data)] = data
    return len(data)


def _most() -> int:
    """``MOST``, or half of the files that the system allows this process now."""
    try:
        allowed = os.sysconf("SC_OPEN_MAX")
    except (AttributeError, ValueError, OSError):
        return MOST
    return min(MOST, allowed // 2) if allowed > 0 else MOST


def _close_others(file: KeptFile) -> None:
    """Note that a file was opened, and close those that were opened the longest time ago."""
    with _guard:
        _open[id(file)] = file
        _order[id(file)] = None
        _order.move_to_end(id(file))
        for key in list(_order)[: max(0, len(_order) - _most())]:
            old = _open.get(key)
            if old is None or old.try_close():
                del _order[key]
