"""One run at a time into one output: a lock beside it, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows; runs into one output are then not told apart
    fcntl = None  # type: ignore[assignment]

_reserved: dict[Path, int] = {}
"""Outputs that this process holds and does not yet write, with the thread that may."""


def beside(target: Path, ending: str) -> Path:
    """A hidden name beside an output, its own also where names are too long to be repeated."""
    name = target.name
    if len(os.fsencode(name)) > 100:
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.with_name(f".{name}.{ending}")


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold an output for writing. Its parent must exist; a thread that has it reserved takes it over.

    Raises:
        OSError: another run, or another thread, holds it (``EBUSY``), or the place cannot be written.
    """
    if _reserved.get(target) == threading.get_ident():
        del _reserved[target]
        try:
            yield
        finally:
            _reserved[target] = threading.get_ident()
    else:
        with _file_lock(target):
            yield


@contextlib.contextmanager
def reserved(target: Path) -> Iterator[None]:
    """Keep others out of an output from now on; within the block this thread writes it under ``locked``.

    Raises:
        OSError: as ``locked``.
    """
    with locked(target):
        _reserved[target] = threading.get_ident()
        try:
            yield
        finally:
            del _reserved[target]


@contextlib.contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    path = beside(target, "lock")
    descriptor = _acquire(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: who comes now finds another file in its place
        os.close(descriptor)


def _acquire(path: Path, target: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            error.filename = str(target)
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                with contextlib.suppress(OSError):  # a full disk; it is only for the others' message
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)  # its holder has just removed it
        except OSError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                reason = f"another run is writing this output (process {holder or 'unknown'})"
                raise OSError(errno.EBUSY, reason, str(target)) from error
            error.filename = str(target)
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
