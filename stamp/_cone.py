"""Where the gradients can be weighted to zero: the projection of the mean gradient on the cone they all agree with.

It is a non-negative least squares problem, solved by the active-set method of Lawson and Hanson (1974) on the normal
equations.
"""

from __future__ import annotations

import numpy as np
import torch

from ._linear import solve_lower, solve_once_factored
from ._problem import Array, Mask, Problem

GAIN = 1e-14  # a gradient below this, for a unit diagonal, is rounding
PIVOT = 1e-12  # squared distance of a unit column from the span of others below which it counts as inside


def cone_projection(problem: Problem, w: Array) -> tuple[Array, float]:
    """Project ``g0`` on ``{d: <g_k, d> >= 0 for all k}``, given ``w`` with ``g_w = 0``.

    The projection is ``g0 + s g_x`` with ``x >= 0`` outside the support of ``w`` (inside it every ``<g_k, d>`` is 0,
    for their weighted sum is): a non-negative least squares problem.

    Returns:
        ``x``, shape (K,), and ``||g_x||``. At most 1, the projection lies in the ball around ``g0`` and solves the
        matching with value 0. Above 1 every direction of the ball hurts someone, and ``g_x`` is the way to less.
    """
    lengths = np.where(problem.norms > 0, problem.norms, 1.0)
    A = (problem.n + problem.h[:, None] + problem.h + problem.H) / lengths[:, None] / lengths
    right = -(problem.constant + problem.beta) / lengths / problem.s
    zero = problem.norms == 0
    A[zero], A[:, zero], right[zero] = 0.0, 0.0, 0.0
    x = nonnegative_least_squares(A, right, _support(w))
    return x / lengths, float(np.sqrt(max(float(x @ A @ x), 0.0)))


def leave(w: Array, x: Array) -> Array:
    """Weights proportional to ``x`` plus as much of ``w`` (with ``g_w = 0``) as makes none negative."""
    free = _support(w)
    moved = np.maximum(x + max(float((-x[free] / w[free]).max()), 0.0) * w, 0.0)
    return moved / moved.sum()


def _support(w: Array) -> Mask:
    """Members whose weight is more than the trace of one that only just entered."""
    return w > 1e-12 * w.max()


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
