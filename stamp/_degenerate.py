"""Where the gradients can be weighted to zero: the projection of the mean gradient on the cone they all agree with."""

from __future__ import annotations

import numpy as np

from ._nnls import nonnegative_least_squares
from ._problem import Array, Mask, Problem


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
