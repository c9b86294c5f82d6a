"""The files that opened adapters read, and outputs that would take the place of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fedgram.flora_na.layer import AdapterLike, as_adapter

PathLike = str | os.PathLike[str]


def files_of(adapter: AdapterLike) -> tuple[Path, ...] | None:
    """What an adapter reads, in a fixed order: for the layers, then for the extras; None where it is not known.

    Known it is of the mappings that ``load_adapter`` makes, which have it as ``files``.
    """
    adapter = as_adapter(adapter)
    layers: tuple[Path, ...] | None = getattr(adapter.modules, "files", None)
    extras: tuple[Path, ...] | None = getattr(adapter.extras, "files", None) if adapter.extras else ()
    return None if layers is None or extras is None else (*layers, *extras)


def size_of(adapters: Iterable[AdapterLike]) -> int:
    """Bytes of all files that adapters are known to read."""
    return sum(path.stat().st_size for path in {path for adapter in adapters for path in files_of(adapter) or ()})


def check_kept(outputs: Iterable[PathLike], clients: Iterable[AdapterLike]) -> None:
    """Refuse outputs that would take the place of a folder that the clients are read from.

    Raises:
        ValueError: names the output.
    """
    files = {path for client in clients for path in files_of(client) or ()}
    read = {os.path.realpath(folder) for folder in {path.parent for path in files}}
    read |= {os.path.dirname(os.path.realpath(path)) for path in files if path.is_symlink()}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise ValueError(f"{path}: is one of the clients' directories, or read with them: choose another output")


def check_separate(output: PathLike, other: PathLike | None) -> None:
    """Refuse two outputs of which one lies in the other.

    Raises:
        ValueError: names the second.
    """
    real = [os.path.realpath(path) for path in (output, other) if path is not None]
    if len(real) == 2 and os.path.commonpath(real) in real:
        raise ValueError(f"{other}: one output lies in the other: choose separate directories")
