"""Has the system write to the disk, meanwhile, what is appended to a file: little is left to wait for at the end."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

STEP = 32 << 20
"""Bytes that may wait in memory before they are sent to the disk."""


class WriteBehind:
    """A thread that flushes a file each time that many bytes more were written, where the system has ``fdatasync``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._asked_for = 0
        self._running: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedgram-write-behind")

    def __call__(self, end: int) -> None:
        """Note that the file has been written up to ``end``.

        Raises:
            OSError: an earlier flush failed.
        """
        if end - self._asked_for < STEP or not hasattr(os, "fdatasync"):
            return
        if self._running is not None:
            if not self._running.done():
                return
            self._running.result()
        self._asked_for = end
        self._running = self._thread.submit(os.fdatasync, self._descriptor)

    def close(self) -> None:
        """Wait for the flush that is under way; what comes of it, the flush at the end will find too."""
        self._thread.shutdown()
