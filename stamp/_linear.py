"""Symmetric solves of the sizes met here: LAPACK on one thread while small, torch's Cholesky beyond.

A thread pool costs more than a small solve takes, by orders of magnitude on a busy machine. numpy's LAPACK keeps small
matrices on one thread; torch's does not.
"""

from __future__ import annotations

import numpy as np
import torch

from ._problem import Array

SMALL = 96
SINGULAR = 3e-8  # a Cholesky pivot below this (unit diagonal) is rounding of the Gram matrix


def solve_gram(C: Array, sides: Array) -> Array | None:
    """Solve ``C X = sides`` for a Gram matrix of unit diagonal; None where it is singular to rounding."""
    if len(C) == 1:
        return sides / C
    if len(C) <= SMALL:
        try:
            pivots = np.linalg.cholesky(C).diagonal()
            return _solved(C, sides) if pivots.min() >= SINGULAR else None
        except np.linalg.LinAlgError:  # of LU, too: a pivot that Cholesky left just above rounding may be its zero
            return None
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(C))
    if int(failed) or float(factor.diagonal().min()) < SINGULAR:
        return None
    return solve_once_factored(factor, C, sides)


def is_positive_definite(C: Array) -> bool:
    """Whether the Cholesky factorisation of ``C`` goes through."""
    if len(C) > SMALL:
        return int(torch.linalg.cholesky_ex(torch.from_numpy(C))[1]) == 0
    try:
        np.linalg.cholesky(C)
    except np.linalg.LinAlgError:
        return False
    return True


def solve_once_factored(factor: torch.Tensor, C: Array, sides: Array) -> Array:
    """Solve ``C X = sides``, shape (n, m), once the lower Cholesky factor of ``C`` is known.

    A small one is solved anew by LU, which costs as little and needs no refinement; a large one by the factor, refined
    once.
    """
    if len(C) <= SMALL:
        return _solved(C, sides)
    right = torch.from_numpy(sides)
    X = torch.cholesky_solve(right, factor)
    return (X + torch.cholesky_solve(right - torch.from_numpy(C) @ X, factor)).numpy()


def solve_lower(factor: torch.Tensor, side: Array) -> Array:
    """Solve ``factor x = side`` for a lower triangular factor; ``side`` has shape (n,)."""
    if len(side) <= SMALL:
        return _solved(factor.numpy(), side)
    return torch.linalg.solve_triangular(factor, torch.from_numpy(side)[:, None], upper=False)[:, 0].numpy()


def _solved(C: Array, sides: Array) -> Array:
    return np.linalg.solve(C, sides).astype(np.float64, copy=False)
