"""Checks of what callers hand in: numbers, and Gram matrices for the dual."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._linear import is_positive_definite
from ._problem import EPS, Array
from .gramian import as_tensor

FLOAT32 = 1e-3  # float32 sums over millions of products may be off by that; Gram matrices made of them are welcome
HALF = 2e-2
ROUGH = 1e-6  # n0 and h of float32 sums may be off by that share of the largest squared norm


def checked_strength(c: float) -> float:
    """Return ``c`` as a float in [0, 1).

    Raises:
        ValueError: it is not one number in that range.
    """
    try:
        value = float(c)
    except (TypeError, ValueError):
        raise ValueError(f"c: expected one number in [0, 1), got {c!r}") from None
    if not 0 <= value < 1:
        raise ValueError(f"c: expected a number in [0, 1), got {value}")
    return value


def checked_number(number: Any, argument: str) -> float:
    """Return the number as a float. Raises ValueError where it is none, or not finite."""
    try:
        value = float(number)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{argument}: expected a finite number, got {number!r}") from None
    if isinstance(number, str) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {number!r}")
    return value


def checked_whole(number: Any, argument: str) -> int:
    """Return the number as an int. Raises ValueError where it is not whole."""
    try:
        return int(number) if isinstance(number, float) and number.is_integer() else operator.index(number)
    except TypeError:
        raise ValueError(f"{argument}: expected a whole number, got {number!r}") from None


def checked_matrix(G: Tensor | np.ndarray) -> Tensor:
    """Return a Gram matrix (K, K) or a batch of them as float64 on its device, its shape and dtype checked."""
    try:
        matrix = as_tensor(G)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"gramian: expected a matrix ({error})") from None
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"gramian: expected (K, K) or (batch, K, K), got {tuple(matrix.shape)}")
    if matrix.shape[-1] == 0:
        raise ValueError("gramian: K is 0; at least one gradient is needed")
    if matrix.ndim == 3 and len(matrix) == 0:
        raise ValueError("gramian: the batch has no matrix")
    if matrix.is_complex():
        raise ValueError(f"gramian: expected real numbers, got {matrix.dtype}")
    return matrix.detach().to(torch.float64)


def check_finite(G: Array) -> None:
    """Raise ValueError naming the gradient if a dense Gram matrix, or one of a batch, is not finite."""
    if np.isfinite(G).all():
        return
    G = next(one for one in G.reshape(-1, *G.shape[-2:]) if not np.isfinite(one).all())
    # A bad gradient spoils its own row and one entry of every other row.
    rows = np.flatnonzero(~np.isfinite(G).all(axis=1))
    task = next((int(k) for k in rows if not math.isfinite(G[k, k])), int(rows[0]))
    raise ValueError(f"gramian: not finite: the squared norm of gradient {task} is {G[task, task]}")


def check_values(G: Array, accuracy: float = FLOAT32) -> None:
    """Check one dense Gram matrix on the host: finite, symmetric, positive semidefinite, each up to rounding.

    Raises:
        ValueError: which entry, and by how much.
    """
    check_finite(G)
    diagonal = G.diagonal()
    floor = 64 * EPS * float(np.abs(diagonal).max())  # a plain matrix made from a centred one is off by that
    if (diagonal < -floor).any():
        k = int(diagonal.argmin())
        raise ValueError(f"gramian: entry ({k}, {k}) is {diagonal[k]:.3g}; a squared norm is not negative")
    unit = np.sqrt(np.maximum(diagonal, 0.0) + floor / accuracy + 1e-300)
    scaled = G / unit[:, None] / unit
    skew = np.abs(scaled - scaled.T)
    if skew.max() > accuracy:
        i, j = np.unravel_index(int(skew.argmax()), G.shape)
        raise ValueError(
            f"gramian: not symmetric: entries ({i}, {j}) and ({j}, {i}) are {G[i, j]:.9g} and {G[j, i]:.9g}"
        )
    shifted = (scaled + scaled.T) / 2 + 2 * accuracy * math.sqrt(len(G)) * np.eye(len(G))
    if not is_positive_definite(shifted):
        lowest = float(np.linalg.eigvalsh(scaled)[0])
        raise ValueError(
            f"gramian: indefinite: its smallest eigenvalue, for gradients scaled to length 1, is {lowest:.3g}; "
            "inner products cannot give that"
        )


def check_centre(n0: float, h: Array, H: Array) -> None:
    """Check that a vector ``g0`` can have ``||g0||^2 = n0`` and ``<g0, e_k> = h_k`` beside ``<e_k, e_l> = H_kl``.

    Raises:
        ValueError: it cannot, beyond what float32 sums are off by.
    """
    diagonal = np.append(n0, H.diagonal())
    floor = ROUGH * float(np.abs(diagonal).max()) + 1e-300
    if n0 < -floor:
        raise ValueError(f"gramian: n0 is {n0:.3g}; a squared norm is not negative")
    unit = np.sqrt(np.maximum(diagonal, 0.0) + floor)
    bordered = np.empty((len(unit), len(unit)))
    # a mean near zero: what rounding has left of its square may well be below it
    bordered[0, 0], bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = max(n0, 0.0), h, h, (H + H.T) / 2
    bordered /= unit[:, None] * unit
    bordered.flat[:: len(unit) + 1] += 2 * FLOAT32 * math.sqrt(len(unit))
    if not is_positive_definite(bordered):
        raise ValueError("gramian: n0, h and H together are indefinite; inner products cannot give that")
