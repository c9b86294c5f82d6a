"""A safetensors file whose data lies on the disk already: it gets its header, and a second name instead of a copy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .documents import filed_errors
from .tensor_file import header_of
from .tensor_header import DTYPES, MAX_HEADER, TensorSpec

PAGE = 4096
ENTRY = 192
"""Bytes that a header takes for a tensor, about, beside its name."""


def header_room(names: Iterable[str]) -> int:
    """Bytes to leave in front of the data of tensors of these names: whole pages; 0 where no file may have so many."""
    room = -(-(PAGE // 2 + sum(len(name) + ENTRY for name in names)) // PAGE) * PAGE
    return room if room <= MAX_HEADER else 0


def link_tensors(data: Path, path: Path, room: int, tensors: Mapping[str, TensorSpec]) -> bool:
    """Make ``path`` a safetensors file of the bytes of ``data``, without copying them.

    Args:
        data: a file whose first ``room`` bytes are free.
        path: a new file on the same file system.
        room: multiple of the size of a page.
        tensors: dtype, shape, and where in ``data`` each begins.

    Returns:
        False, and nothing has happened, where it cannot be: tensors that do not fill the rest of the file without
        gaps, or would not lie at multiples of their item size; no room for the header; a file system without links.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda key: (tensors[key].start, tensors[key].nbytes))
    header = header_of(tensors, order, room)
    if header is None or not _fills(data, room, [tensors[key] for key in order]):
        return False
    try:
        os.link(data, path)
    except OSError:
        return False
    with filed_errors(path), open(path, "r+b") as file:
        file.write(header)
        file.flush()
        os.fsync(file.fileno())
    return True


def _fills(data: Path, room: int, tensors: Iterable[TensorSpec]) -> bool:
    end = room
    for spec in tensors:
        if spec.start != end or (end - room) % DTYPES[spec.dtype].itemsize:
            return False
        end += spec.nbytes
    return data.stat().st_size == end
