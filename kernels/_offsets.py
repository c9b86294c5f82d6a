"""Boundaries of tasks or classes: numbers on the host, as they shape the work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor


def host_integers(values: Tensor | Sequence[int], name: str) -> list[int]:
    """A list, or a vector on the CPU, as a list; ValueError for anything else, a tensor on a GPU included."""
    if not isinstance(values, Tensor):
        return [int(v) for v in values]
    if values.device.type != "cpu":
        raise ValueError(f"{name}: expected a list or a CPU tensor, as they shape the work, got {values.device}")
    if values.ndim != 1 or values.is_floating_point():
        raise ValueError(f"{name}: expected a vector of integers, got {tuple(values.shape)} {values.dtype}")
    return values.tolist()


def checked_offsets(offsets: Tensor | Sequence[int], rows: int) -> tuple[int, ...]:
    """The boundaries, or ValueError unless they begin with 0, never fall, and end with ``rows``."""
    bounds = tuple(host_integers(offsets, "offsets"))
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"offsets: expected boundaries that never fall from 0 to {rows}, got {list(bounds)}")
    return bounds
