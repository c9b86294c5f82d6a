"""One dual to rounding on the CPU: Frank-Wolfe finds the face, closed forms solve it, an active set makes sure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._cone import cone_projection, leave
from ._faces import descend
from ._frank_wolfe import pairwise_frank_wolfe
from ._problem import Array, Point, Problem

VIOLATION = 1e-14  # a task that gains less than this share of its terms is not let in
CROWD, SHARE = 32, 0.3  # tasks let in at once, and the share of the largest gain that they must promise
COARSE = 1e-6  # Frank-Wolfe only has to find the face
EXITS = 5  # from points where the gradients vanish and the optimum is not
STALLS = 6  # faces in a row on which neither the objective nor the gap falls, until that is taken for rounding
STATUSES = ("optimal", "degenerate", "mean", "stationary", "inexact", "nonfinite")


@dataclass(frozen=True, eq=False)
class Solution:
    """What the exact solver found."""

    w: Array
    step: Array  # v - u
    share: float  # ||d - g0|| / ||g0||
    objective: float
    gap: float
    doubt: float  # how much larger the gap may be by the rounding of the Gram matrix
    scale: float
    status: str
    iterations: int


def solve(problem: Problem) -> Solution:
    """Solve to the rounding of the Gram matrix. K = 1 and K = 2 come out in closed form: one face."""
    trivial = _without_search(problem)
    if trivial is not None:
        return trivial
    w = problem.u.copy()
    point = problem.at(w)
    if point.gap <= 0:  # the mean itself, as for gradients that agree: g_w = g0 to the last bit
        return replace(_regular(problem, point, 0), step=problem.c * w)
    return _active_set(problem, _start(problem))


def _start(problem: Problem) -> Array:
    """Frank-Wolfe from the best vertex where there are faces enough to choose from, else the one face."""
    if problem.K <= 2:
        return np.full(problem.K, 1.0 / problem.K)
    w = np.zeros(problem.K)
    w[int((problem.beta + problem.s * problem.norms).argmin())] = 1.0
    return pairwise_frank_wolfe(problem, w, 8 * problem.K, COARSE)


def _without_search(problem: Problem) -> Solution | None:
    if problem.n0 == 0:
        u = problem.u.copy()
        return Solution(u, np.zeros_like(u), 0.0, 0.0, 0.0, 0.0, 0.0, "stationary", 0)
    if problem.c == 0:
        w = np.zeros(problem.K)
        w[int(problem.beta.argmin())] = 1.0
        value = float(problem.constant + problem.beta.min())
        return Solution(w, np.zeros_like(w), 0.0, value, 0.0, 0.0, problem.scale(w > 0), "mean", 0)
    return None


def _regular(problem: Problem, point: Point, iterations: int) -> Solution:
    step = (problem.s / point.norm) * point.w
    scale = problem.scale(point.w > 0)
    doubt = problem.doubt(point)
    return Solution(point.w, step, problem.c, problem.objective(point), point.gap, doubt, scale, "optimal", iterations)


def _on_the_cone(problem: Problem, point: Point, x: Array, length: float, iterations: int) -> Solution:
    w, share = point.w, problem.c * min(length, 1.0)
    step = problem.s / max(length, 1.0)
    worst = float((problem.constant + problem.beta + step * _gram(problem, x)).min())
    scale = max(problem.n0, problem.scale((w > 0) | (x != 0)))
    status = "inexact" if point.hidden(problem.norms) else "degenerate"
    return Solution(w, step * x, share, 0.0, max(-worst, 0.0), 0.0, scale, status, iterations)


def _gram(problem: Problem, x: Array) -> Array:
    """``G x`` for any ``x``."""
    return problem.n * x.sum() + problem.h * x.sum() + float(problem.h @ x) + problem.H @ x


def _active_set(problem: Problem, w: Array) -> Solution:
    """Solve the face of ``w``, let in the tasks that gain by it, and so on; the smallest gap seen."""
    best: Solution | None = None
    iterations, stalled, exits, lowest = 0, 0, 0, np.inf
    limit = 30 * problem.K + 100
    while iterations < limit and stalled < STALLS:
        w, solves = descend(problem, w, limit - iterations)
        iterations += solves
        point = problem.at(w)
        if point.vanishing:
            x, length = cone_projection(problem, w)
            below_zero = length > 1 + 1e-9  # the optimum is, and lies away from this point
            if below_zero and exits < EXITS and iterations < limit:
                exits += 1
                w = pairwise_frank_wolfe(problem, leave(w, x), 8 * problem.K, COARSE)
                continue
            return _on_the_cone(problem, point, x, length, iterations)
        found = _regular(problem, point, iterations)
        # The objective falls with every face; the gap need not. Neither falling is rounding.
        stalled = 0 if best is None or found.gap < best.gap or found.objective < lowest else stalled + 1
        lowest = min(lowest, found.objective)
        if best is None or found.gap < best.gap:
            best = found
        entering = _entering(problem, point, 1 if stalled else CROWD)
        if not len(entering):
            break
        w = w.copy()
        w[entering] = np.finfo(np.float64).tiny
    assert best is not None
    return replace(best, iterations=iterations)


def _entering(problem: Problem, point: Point, most: int) -> Array:
    """The tasks outside the face that gain most, relative to the rounding of their terms: at most so many."""
    # A gradient at the centre has no rounding at all; the quotient is to stay finite for it.
    gain = (point.slope - float(point.w @ point.slope)) / np.maximum(problem.rounding(point.w), 1e-200)
    gain[point.w > 0] = np.inf
    first = gain.argsort(kind="stable")[:most]
    return first[gain[first] < min(-VIOLATION, SHARE * gain[first[0]])]
