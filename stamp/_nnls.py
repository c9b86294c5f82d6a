"""Non-negative least squares by the active-set method of Lawson and Hanson (1974), on the normal equations."""

from __future__ import annotations

import numpy as np
import torch

from ._linear import solve_lower, solve_once_factored
from ._problem import Array, Mask

GAIN = 1e-14  # a gradient below this, for a unit diagonal, is rounding
PIVOT = 1e-12  # squared distance of a unit column from the span of others below which it counts as inside


def nonnegative_least_squares(A: Array, right: Array, free: Mask) -> Array:
    """Minimise ``x'Ax / 2 - right'x`` with ``x >= 0`` outside ``free``.

    Args:
        A: shape (n, n), symmetric, positive semidefinite, diagonal 1 (or 0 for zero columns).
        right: shape (n,), in the range of ``A``.
        free: bool, shape (n,): columns without a sign constraint. Those that depend on others get ``x = 0``.
    """
    passive = _Passive(A, right)
    for k in np.flatnonzero(free).tolist():
        passive.append(k)
    x = passive.fit()
    barred = free.copy()  # and columns that depend on the passive ones
    tolerance = GAIN * (1.0 + float(np.abs(right).max()))
    for _ in range(3 * len(right) + 10):
        gain = right - A @ x
        gain[barred] = -np.inf
        gain[passive.index] = -np.inf
        j = int(gain.argmax())
        if gain[j] <= tolerance:
            break
        if not passive.append(j):
            barred[j] = True
            continue
        trial = passive.fit()
        if trial[j] <= 0:
            passive.keep([i for i in passive.index if i != j])
            barred[j] = True
            continue
        barred[:] = free
        x = _back_inside(passive, x, trial, free)
    return x


def _back_inside(passive: _Passive, x: Array, trial: Array, free: Mask) -> Array:
    """Walk from ``x`` to the unconstrained fit ``trial``, dropping every column that would turn negative."""
    while True:
        falling = np.flatnonzero((trial < 0) & ~free)
        if not len(falling):
            return trial
        ratio = x[falling] / (x[falling] - trial[falling])
        x = x + float(ratio.min()) * (trial - x)
        x[falling[ratio <= ratio.min()]] = 0.0
        passive.keep([i for i in passive.index if free[i] or x[i] > 0])
        trial = passive.fit()


class _Passive:
    """The unconstrained columns and the Cholesky factor of their Gram matrix, grown a row at a time."""

    def __init__(self, A: Array, right: Array) -> None:
        self.A, self.right = A, right
        self.index: list[int] = []
        self.factor = torch.zeros(A.shape, dtype=torch.float64, device="cpu")

    def append(self, j: int) -> bool:
        """Let column ``j`` in, unless it lies in the span of those inside."""
        m = len(self.index)
        row = solve_lower(self.factor[:m, :m], self.A[j, self.index]) if m else np.zeros(0)
        pivot = float(self.A[j, j] - row @ row)
        if pivot <= PIVOT:
            return False
        self.factor[m, :m] = torch.from_numpy(row)
        self.factor[m, m] = pivot**0.5
        self.index.append(j)
        return True

    def keep(self, index: list[int]) -> None:
        """Reduce to ``index``, a subset in the same order: rows before the first one dropped stay as they are."""
        same = next((k for k, (a, b) in enumerate(zip(self.index, index, strict=False)) if a != b), len(index))
        self.index, rest = index[:same], index[same:]
        for j in rest:
            self.append(j)

    def fit(self) -> Array:
        """Solve the normal equations of the columns inside; zero outside."""
        x = np.zeros(len(self.right))
        m = len(self.index)
        if m:
            C, b = self.A[np.ix_(self.index, self.index)], self.right[self.index][:, None]
            x[self.index] = solve_once_factored(self.factor[:m, :m], C, b)[:, 0]
        return x
