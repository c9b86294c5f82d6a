"""What identifies a run: if any of it differs, the finished modules of an interrupted run are not used."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgram import flora_na
from fedgram.flora_na import Adapter
from fedgram.flora_na.weights import Weights, normalise_weights

FORMAT = 1
SUFFIXES = (".json", ".safetensors")


def run_identity(
    adapters: Sequence[Adapter],
    sources: Sequence[str | os.PathLike[str]],
    weights: Weights,
    names: Sequence[str] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Files with their sizes and times, configurations as read, weights, options and versions; JSON-ready.

    An option that is no JSON value (an adapter) counts by being there: its files are among the sources. To be taken
    after the adapters were opened: they do not read files that were changed since.
    """
    configs = json.dumps([adapter.config for adapter in adapters], sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "versions": {name: _version(name) for name in ("fedgram", "torch")},
        "configs": hashlib.sha256(configs.encode()).hexdigest(),
        "files": {str(path): _stamp(path) for source in sources for path in _files(source)},
        "clients": None if names is None else [str(name) for name in names],
        "weights": normalise_weights(weights, len(adapters)).tolist(),
        "options": {name: _plain(value) for name, value in sorted({**_defaults(), **options}.items())},
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


def _files(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The files under an adapter directory that may be read, in a fixed order."""
    for folder, inner, names in os.walk(os.path.realpath(source)):
        inner.sort()
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES))


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
