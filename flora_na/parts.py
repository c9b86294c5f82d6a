"""Full tensors that can be read in parts: a mapping may offer ``shape(name)`` and ``part(name, start, stop)``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor; read for it only where the mapping cannot tell."""
    known = getattr(tensors, "shape", None)
    return tuple(tensors[name].shape) if known is None else known(name)


def part_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """The numbers ``start:stop`` of a tensor in a row; without the rest where the mapping can do that."""
    part = getattr(tensors, "part", None)
    return tensors[name].flatten()[start:stop] if part is None else part(name, start, stop)
