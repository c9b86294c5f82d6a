"""Client weights: checked once, normalised to sum 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Weights = Sequence[float] | Tensor | None


def real_numbers(argument: str, numbers: Sequence[float] | Tensor) -> Tensor:
    """Numbers of an argument as a flat float64 tensor on the CPU.

    Raises:
        ValueError: they are no real numbers; the message names the argument.
    """
    if isinstance(numbers, Tensor) and numbers.is_complex():
        raise ValueError(f"{argument}: expected real numbers, got {numbers.dtype}")
    try:
        return torch.as_tensor(numbers, dtype=torch.float64, device="cpu").flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{argument}: expected real numbers, got {numbers!r}") from None


def normalise_weights(weights: Weights, count: int, names: Sequence[str] | None = None) -> Tensor:
    """Return ``count`` non-negative weights of sum 1, shape (count,), float64 on the CPU; uniform for None.

    Weights that sum to 1 already (to rounding) are returned as they are: to normalise twice is to normalise once.
    ``names`` are the clients' labels in errors.

    Raises:
        ValueError: no clients, or weights of the wrong number, negative, not finite or all zero.
    """
    if count == 0:
        raise ValueError("adapters: expected at least one client, got none")
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device="cpu")
    w = real_numbers("weights", weights)
    if w.numel() != count:
        raise ValueError(f"weights: expected {count} (one per client), got {w.numel()}")
    values = w.tolist()
    for u, value in enumerate(values):
        if not 0.0 <= value < float("inf"):
            label = f"client {u}" if names is None else names[u]
            raise ValueError(f"weights: {label} has {value}; expected a finite number >= 0")
    if not any(values):
        raise ValueError("weights: all are zero; at least one must be positive")
    if max(values) <= 2.0 and abs(math.fsum(values) - 1.0) <= count * torch.finfo(w.dtype).eps:
        return w.clone()
    return (w / w.max()) / (w / w.max()).sum()
