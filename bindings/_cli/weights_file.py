"""Weights of the clients from a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.documents import unambiguous


def read_weights(path: Path | None, clients: Sequence[Path]) -> list[float] | None:
    """One weight per client from a JSON file: an object by directory name (or path), or a list in the given order.

    Raises:
        ValueError: not such JSON, a client without a weight, a name that is no client, or a weight below zero.
        OSError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unambiguous)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if isinstance(document, dict):
        document = _in_order(path, document, clients)
    if not isinstance(document, list):
        raise ValueError(f"{path}: expected an object from directory name to number, or a list of numbers")
    if len(document) != len(clients):
        raise ValueError(f"{path}: {len(document)} weights for {len(clients)} clients")
    return [_weight(path, client, value) for client, value in zip(clients, document, strict=True)]


def _in_order(path: Path, document: dict[str, Any], clients: Sequence[Path]) -> list[Any]:
    names = [_name(client) for client in clients]
    keys = [
        name if names.count(name) == 1 and name in document else str(c) for name, c in zip(names, clients, strict=True)
    ]
    missing = [name for name, key in zip(names, keys, strict=True) if key not in document]
    if missing:
        raise ValueError(f"{path}: no weight for client {missing[0]!r}")
    unknown = sorted(document.keys() - set(keys))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is not the directory of a client")
    return [document[key] for key in keys]


def _name(client: Path) -> str:
    return os.path.basename(os.path.abspath(client))


def _weight(path: Path, client: Path, value: Any) -> float:
    number = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float is near to
            number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{path}: client {_name(client)!r}: expected a number of at least 0, got {value!r}")
    return number
