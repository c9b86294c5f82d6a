"""The exact minimum on one face of the simplex, in closed form, and the descent through faces."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from ._linear import solve_gram
from ._problem import EPS, Array, Problem


@dataclass(frozen=True, eq=False)
class FaceMinimum:
    """The minimum over the affine hull of a face: a finite point, or a ray along which the objective falls."""

    direction: Array  # from the given weights to the minimum, or along the ray; sums to 0
    ray: bool


def face_minimum(problem: Problem, members: NDArray[np.intp], w: Array) -> FaceMinimum:
    """Minimise over the weights, summing to 1, of ``members`` (sorted by norm, the smallest first) from ``w``.

    With alpha the point of least norm and ``s C z = -beta`` on differences to the first member, the minimum is
    ``alpha + t z`` with ``t = sqrt(||g_alpha||^2 / (1 - ||g_z||^2))``; ``||g_z|| >= 1`` makes z a ray.
    """
    m = len(members)
    if m == 1:
        return FaceMinimum(np.zeros(1), ray=False)
    H = problem.H[np.ix_(members, members)]
    h, beta = problem.h[members], problem.beta[members]
    C = H[1:, 1:] - H[1:, :1] - H[:1, 1:] + H[0, 0]
    sides = np.stack([h[0] + H[0, 0] - h[1:] - H[0, 1:], (beta[0] - beta[1:]) / problem.s], axis=1)
    # Squared lengths below the rounding of what they were subtracted from are taken for that rounding.
    roots = problem.root[members]
    rounding = EPS * (roots[1:] ** 2 + roots[0] ** 2) + EPS * EPS * max(problem.n, 0.0) + 1e-300
    squares = np.maximum(C.diagonal(), rounding)
    np.fill_diagonal(C, squares)
    length = np.sqrt(squares)
    unit, sides = C / length[:, None] / length, sides / length[:, None]
    solved = solve_gram(unit, sides)
    if solved is None:
        solved = np.linalg.lstsq(unit, sides, rcond=1e-13)[0]
    solved /= length[:, None]
    alpha, z = np.empty(m), np.empty(m)
    alpha[1:], z[1:] = solved[:, 0], solved[:, 1]
    alpha[0], z[0] = 1 - alpha[1:].sum(), -z[1:].sum()
    r = max(float(z @ H @ z), 0.0)
    if r >= 1 - 1e-13:
        return FaceMinimum(z, ray=True)
    reach = sqrt(max(problem.n, 0.0)) + float(np.abs(alpha) @ problem.root[members])
    p = problem.n + float(2 * (h @ alpha) + alpha @ H @ alpha)
    t = 0.0 if p <= 1e-14 * reach * reach else sqrt(p / (1 - r))
    return FaceMinimum(alpha + t * z - w, ray=False)


def descend(problem: Problem, w: Array, limit: int) -> tuple[Array, int]:
    """Step from ``w`` to the minimum of its face, dropping a member whenever the way leaves the simplex.

    Returns the weights and the number of faces solved, at most ``limit``.
    """
    members = np.flatnonzero(w > 0)
    members = members[np.argsort(problem.norms[members], kind="stable")]
    part = w[members]
    solves = 0
    while solves < limit:
        solves += 1
        minimum = face_minimum(problem, members, part)
        step, stop = _longest_step(part, minimum)
        if step == inf:  # a ray that leaves through no face: rounding
            break
        part = np.maximum(part + step * minimum.direction, 0.0)
        if stop < 0:
            break
        part[stop] = 0.0
        keep = part > 0
        members, part = members[keep], part[keep] / part[keep].sum()
    result = np.zeros_like(w)
    result[members] = part / part.sum()
    return result, solves


def _longest_step(w: Array, minimum: FaceMinimum) -> tuple[float, int]:
    """The step along the direction, and the member it drops or -1 where it reaches the minimum."""
    falling = minimum.direction < 0
    ratio = np.full(len(w), inf)
    np.divide(w, -minimum.direction, out=ratio, where=falling)
    k = int(ratio.argmin())
    if ratio[k] < (inf if minimum.ray else 1.0):
        return float(ratio[k]), k
    return (inf if minimum.ray else 1.0), -1
