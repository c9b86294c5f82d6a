"""What identifies a run: if any of it differs, the finished modules of an interrupted run are not used."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgram import flora_na
from fedgram.flora_na import Adapter
from fedgram.flora_na.layer import AdapterLike
from fedgram.flora_na.weights import Weights, normalise_weights

from .._peft.files import files_of

FORMAT = 3  # also raised where the same options give other numbers than before
Stamp = list[str | int]


def run_identity(
    adapters: Sequence[Adapter], weights: Weights, names: Sequence[str] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What each client, and each adapter among the options, reads; configurations, weights, versions; JSON-ready.

    Files count by their place, size and times, in the order of the clients and of what one adapter reads. An adapter
    whose files are not known is like no other, that of an earlier run included. To be taken after the adapters were
    opened: they do not read files that were changed since.

    Raises:
        OSError: a file is gone.
    """
    stamp = functools.cache(_stamp)  # all clients share the initial adapter
    configs = json.dumps([adapter.config for adapter in adapters], sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("fedgram", "torch")},
        "configs": hashlib.sha256(configs.encode()).hexdigest(),
        "clients": [_stamps(adapter, stamp) for adapter in adapters],
        "names": None if names is None else [str(name) for name in names],
        "weights": normalise_weights(weights, len(adapters)).tolist(),
        "options": {name: _plain(value, stamp) for name, value in sorted({**_defaults(), **options}.items())},
    }


def _defaults() -> dict[str, Any]:
    """The options of ``aggregate`` that were not given; what it is told apart from the result is left out."""
    parameters = inspect.signature(flora_na.aggregate).parameters.values()
    kept = (p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("progress", "names"))
    return {p.name: p.default for p in kept}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _stamps(adapter: AdapterLike, stamp: Callable[[Path], Stamp]) -> list[Stamp] | str:
    files = files_of(adapter)
    return secrets.token_hex(16) if files is None else [stamp(path) for path in files]


def _stamp(path: Path) -> Stamp:
    real = os.path.realpath(path)
    stat = os.stat(real)
    return [real, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _plain(value: Any, stamp: Callable[[Path], Stamp]) -> Any:
    if isinstance(value, Adapter | Mapping):
        return _stamps(value, stamp)
    return value if isinstance(value, str | int | float | bool | None) else [type(value).__name__, repr(value)]
