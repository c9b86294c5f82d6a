"""Weights of the clients from a file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.documents import parse_json


def read_weights(path: Path | None, clients: Sequence[Path]) -> list[float] | None:
    """One weight per client from a JSON file: an object by directory name (or path), or a list in the given order.

    Raises:
        ValueError: not such JSON, a client without a weight, a name that is no client or that of several, a weight
            below zero, or none above.
        OSError: the file cannot be read.
    """
    if path is None:
        return None
    document = parse_json(path.read_bytes(), str(path))  # it may be a pipe: the user's own
    if isinstance(document, dict):
        document = _in_order(path, document, clients)
    if not isinstance(document, list):
        raise ValueError(f"{path}: expected an object from directory name to number, or a list of numbers")
    if len(document) != len(clients):
        raise ValueError(f"{path}: {len(document)} weights for {len(clients)} clients")
    weights = [_weight(path, client, value) for client, value in zip(clients, document, strict=True)]
    if not any(weights):
        raise ValueError(f"{path}: weights: all are zero")
    return weights


def _in_order(path: Path, document: dict[str, Any], clients: Sequence[Path]) -> list[Any]:
    """The values in the order of the clients, each under its path, however written, or a name that no other has."""
    places = {_real(client): client for client in clients}
    names: dict[str, list[Path]] = {}
    for client in clients:
        names.setdefault(_name(client), []).append(client)
    keys: dict[Path, str] = {}
    for key in document:
        place = places.get(_real(key))
        found = names.get(key.rstrip("/"), []) if place is None else [place]
        if not found:
            raise ValueError(f"{path}: {key!r} is not the directory of a client")
        if len(found) > 1:
            raise ValueError(f"{path}: {key!r} is the name of {' and '.join(map(str, found))}: give their paths")
        if found[0] in keys:
            raise ValueError(f"{path}: {keys[found[0]]!r} and {key!r} are the same client")
        keys[found[0]] = key
    for client in clients:
        if client not in keys:
            raise ValueError(f"{path}: no weight for client {_name(client)!r} ({client})")
    return [document[keys[client]] for client in clients]


def _real(path: str | Path) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # characters that no path has
        return str(path)


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
