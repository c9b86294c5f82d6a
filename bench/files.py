"""Output files: that their folder can be written is seen first, and they are there whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Make the folder of the files, where it is missing, and see that a file can be written into it.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` for the block to write its file to, which takes the name of ``path`` when the block ends.

    Where the block fails, nothing is left of it, and what was at ``path`` before stays.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
