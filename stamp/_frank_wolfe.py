"""Pairwise Frank-Wolfe with exact line search: finds which tasks bind, O(K) a step."""

from __future__ import annotations

from math import sqrt

import numpy as np

from ._problem import VANISHING, Array, Problem

REFRESH = 64  # steps between recomputations of the running products, which drift by rounding


def pairwise_frank_wolfe(problem: Problem, w: Array, steps: int, tolerance: float) -> Array:
    """Move weight between pairs of tasks from ``w`` until no move promises more than ``tolerance`` (relative).

    Stops early near ``g_w = 0``, where the objective is not smooth and the face solves take over.
    """
    H, h, beta, root, s = problem.H, problem.h, problem.beta, problem.root, problem.s
    w = w.copy()
    diagonal = H.diagonal()
    base = sqrt(max(problem.n, 0.0))
    for step in range(steps):
        if step % REFRESH == 0:
            w /= w.sum()
            y = H @ w + h
            q = problem.n + float(h @ w + y @ w)
        norm = sqrt(max(q, 0.0))
        if norm <= VANISHING * (base + float(root @ w)):
            break
        slope = beta + (s / norm) * y
        i = int(slope.argmin())
        a = int(np.where(w > 0, slope, -np.inf).argmax())
        size = abs(beta[i]) + s * (abs(h[i]) + root[i] * float(root @ w)) / norm
        if slope[a] - slope[i] <= tolerance * size:
            break
        P, Q = y[i] - y[a], max(diagonal[i] + diagonal[a] - 2 * H[i, a], 0.0)
        x = _line_search(beta[i] - beta[a], P, Q, max(q, 0.0), s, float(w[a]))
        w[i] += x
        w[a] = 0.0 if x >= w[a] else w[a] - x
        q += x * (2 * P + x * Q)
        y += x * (H[i] - H[a])
    return w / w.sum()


def _line_search(B: float, P: float, Q: float, q: float, s: float, most: float) -> float:
    """Minimise ``B x + s sqrt(q + 2 P x + Q x^2)`` over ``0 <= x <= most``, given that it falls at 0."""
    R = s * s * Q - B * B
    if R <= 0 or Q <= 0:
        return most
    x = -B * sqrt(max(q - P * P / Q, 0.0) / (Q * R)) - P / Q
    return min(max(x, 0.0), most)
