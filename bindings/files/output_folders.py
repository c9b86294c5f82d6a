"""The folders around an output: missing parents, and what keeps a folder from being replaced."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

MOUNTS = "/proc/self/mountinfo"


@contextlib.contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Make the missing parents of an output; of those, the ones that are empty when the block ends go again.

    Raises:
        OSError: they cannot be made.
    """
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), target.parents))
    try:
        _make(target.parent)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it holds something, or was not made
                folder.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not os.path.lexists(error.filename):  # another run has just removed it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.filename) from None
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


def is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder (its real path), which then can be neither renamed nor exchanged."""
    return os.path.ismount(folder) or os.fsencode(folder) in _mounts()


def _mounts() -> set[bytes]:
    """Where the system says that something is mounted; ``ismount`` does not see a folder of the same file system."""
    try:
        with open(MOUNTS, "rb") as table:
            fields = [line.split()[4] for line in table]
    except (OSError, IndexError):
        return set()
    return {field.decode("unicode_escape").encode("latin-1") for field in fields}  # a space is \\040


def may_replace(folder: Path) -> bool:
    """Whether the files in a folder, if there are any, may be removed, and a folder of that name be renamed."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return True
    parent = folder.parent.stat()
    if parent.st_mode & stat.S_ISVTX and os.geteuid() not in (folder.stat().st_uid, parent.st_uid):
        return False
    return not os.listdir(folder) or os.access(folder, os.W_OK | os.X_OK)
