"""Means of the full tensors beside the factors, taken piece by piece: an embedding may be larger than memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from torch import Tensor

from fedgram.flora_na import Adapter
from fedgram.flora_na.cohort import Cohort, average_extra
from fedgram.flora_na.parts import part_of, shape_of

from .._peft.lazy_tensors import LazyMapping

PIECE = 1 << 20
"""Numbers of a tensor that are averaged at a time: 8 MiB in float64."""


def extra_shapes(cohort: Cohort) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors beside the factors, in the order in which the clients have them.

    Raises:
        ValueError: shapes differ between clients (names the tensor and two clients).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[str, str] = {}
    for adapter, client in zip(cohort.adapters, cohort.names, strict=True):
        for name in adapter.extras:
            shape = shape_of(adapter.extras, name)
            known = shapes.setdefault(name, shape)
            if shape != known:
                raise ValueError(f"{name}: {client} has shape {shape}, {first[name]} has {known}")
            first.setdefault(name, client)
    return shapes


def extra_pieces(cohort: Cohort, name: str) -> Iterator[Tensor]:
    """The pieces of ``average_extra(cohort, name)``, one after the other as vectors (one of no numbers for none).

    Raises:
        ValueError: as ``average_extra``.
    """
    size = next(prod(shape_of(a.extras, name)) for a in cohort.adapters if name in a.extras)
    for start in range(0, max(size, 1), PIECE):
        pieces = [_piece(adapter, name, start, min(start + PIECE, size)) for adapter in cohort.adapters]
        yield average_extra(replace(cohort, adapters=tuple(pieces)), name)


def _piece(adapter: Adapter, name: str, start: int, stop: int) -> Adapter:
    extras = LazyMapping(
        [name] if name in adapter.extras else [], lambda key: part_of(adapter.extras, key, start, stop)
    )
    return Adapter({}, extras, adapter.config, adapter.roles)
