"""Files of strangers: opened only if they are regular files, and JSON that is small, flat and unambiguous."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 8 << 20
MAX_DEPTH = 32


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; never wait for a pipe or start a device.

    Raises:
        ValueError: there is no such file, or it is something else.
        OSError: it cannot be opened.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'not a regular file' if os.path.lexists(path) else 'no such file'}")
    # What lies there may have been exchanged since: the descriptor decides, and opening it does not block.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file")
    return open(descriptor, "rb")


@contextlib.contextmanager
def filed_errors(path: Path) -> Iterator[None]:
    """Name the file in errors of the operating system that do not: a full disk, a failing one."""
    try:
        yield
    except OSError as error:
        raise named_error(error, path) from None


def named_error(error: OSError, path: Path) -> OSError:
    """The error, with the file where it names none."""
    if error.filename is None and error.errno is not None:
        error.filename = str(path)
    return error


def read_json(path: Path) -> Any:
    """The document in a JSON file of at most 8 MiB.

    Raises:
        ValueError: no regular file, too large, or as ``parse_json``; the message begins with the path.
        OSError: it cannot be read.
    """
    with open_regular(path) as file, filed_errors(path):
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """A JSON document: UTF-8 (a byte order mark is passed over), no name twice in one object, nesting up to 32.

    ``NaN`` and ``Infinity``, which JSON does not have but Python writes, are read.

    Raises:
        ValueError: something else; the message begins with ``where``.
    """
    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unambiguous)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [item for value in level if isinstance(value, dict | list) for item in _items(value)]
    if level:
        raise ValueError(f"{where}: not valid JSON here (nested more than {MAX_DEPTH} deep)")
    return document


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, for ``object_pairs_hook``.

    Raises:
        ValueError: a name is there twice: readers differ in which of its values they take.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse_twice(pairs)
    return found


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name[:200]!r} is there twice")
        seen.add(name)


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value
