"""The dual of one matching as numbers: ``min over the simplex of beta'w + s sqrt(n + 2 h'w + w'Hw)``.

``n + h_k + h_l + H_kl`` is the Gram matrix around any common vector: its mean for a centred Gramian, zero for a plain
matrix. Only differences of ``beta`` and of ``y = Hw + h`` enter, so the size of the common vector costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .gramian import NEAR, Gramian

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

EPS = float(np.finfo(np.float64).eps)
# Below this share of the lengths summed, a length computed from a float64 Gram matrix is rounding: sqrt(45 eps).
VANISHING = 1e-7
# Up to this many times the gradients' own lengths may have been summed, in the distances from the centre, for a zero to
# count as one: a Gramian has no shorter gradients (``gramian.SHORT``) unless nobody could look.
HIDDEN = 2.0**10


@dataclass(frozen=True, eq=False)
class Point:
    """A point of the simplex and what the Gram matrix says of it."""

    w: Array
    norm: float  # ||g_w||
    reach: float  # the lengths summed in g_w: norm is known to about sqrt(eps) * reach
    slope: Array  # gradient of the objective up to a constant; <g_k, d> up to the same constant
    gap: float  # f(w) - min_k <g_k, d>, at least 0 by construction

    @property
    def vanishing(self) -> bool:
        """Whether ``g_w = 0`` to the precision of the Gram matrix."""
        return self.norm <= VANISHING * self.reach

    def hidden(self, norms: Array) -> bool:
        """Whether that precision says little of gradients so short beside the centre, zero or not."""
        return self.reach > HIDDEN * float(self.w @ norms)


@dataclass(frozen=True, eq=False)
class Problem:
    """One dual with everything that does not depend on the point."""

    n: float
    h: Array
    H: Array
    u: Array
    c: float
    beta: Array  # <g_k, g0> up to a constant
    constant: float
    n0: float  # ||g0||^2
    root: Array  # sqrt(H_kk)
    norms: Array  # ||g_k||
    s: float  # c ||g0||

    @classmethod
    def build(cls, n: float, h: Array, H: Array, u: Array, c: float) -> Problem:
        """Derive the rest from the Gram matrix ``n + h_k + h_l + H_kl``, the weights and the strength."""
        Hu = H @ u
        n0 = n + 2 * float(h @ u) + float(u @ Hu)
        diagonal = H.diagonal()
        root = np.sqrt(np.maximum(diagonal, 0.0))
        base = np.sqrt(max(n, 0.0))
        squares = n + 2 * h + diagonal
        norms = np.sqrt(np.where(squares > 16 * EPS * (base + root) ** 2, squares, 0.0))
        reach = base + float(root @ u)
        n0 = 0.0 if n0 <= 16 * EPS * reach * reach else n0
        return cls(n, h, H, u, c, h + Hu, n + float(h @ u), n0, root, norms, c * np.sqrt(n0))

    @property
    def K(self) -> int:
        """The number of gradients."""
        return len(self.h)

    def rounding(self, w: Array) -> Array:
        """Sizes of the terms summed in ``slope`` at ``w``: what one part in 1 / eps of rounding is relative to."""
        y = self.H @ w + self.h
        norm = np.sqrt(max(self.n + float(self.h @ w + y @ w), 1e-300))
        return np.abs(self.beta) + self.s * (np.abs(self.h) + self.root * (self.root @ w)) / norm

    def at(self, w: Array) -> Point:
        """Evaluate the point ``w``. The slope is that of the smooth part where ``g_w`` vanishes exactly."""
        y = self.H @ w + self.h
        norm = float(np.sqrt(max(self.n + float(self.h @ w + y @ w), 0.0)))
        slope = self.beta + (self.s / norm if norm > 0 else 0.0) * y
        # f is homogeneous of degree 1, so f(w) = <w, slope>: the gap is a sum of terms none of which is negative.
        gap = float(w @ (slope - slope.min()))
        reach = float(np.sqrt(max(self.n, 0.0)) + self.root @ w)
        return Point(w, norm, reach, slope, gap)

    def doubt(self, point: Point) -> float:
        """What the rounding of the Gram matrix, 4 eps reach^2 in ``||g_w||^2``, may hide of the gap."""
        return 4 * EPS * self.s * point.reach * (point.reach / point.norm)

    def objective(self, point: Point) -> float:
        """``f(w) = <g_w, g0> + c ||g0|| ||g_w||``."""
        return float(self.constant + self.beta @ point.w + self.s * point.norm)

    def scale(self, active: Mask) -> float:
        """The largest ``|<g_k, g0>| + c ||g0|| ||g_k||`` over the active tasks: what a relative gap is relative to."""
        sizes = np.abs(self.constant + self.beta) + self.s * self.norms
        return float(sizes[active].max() if active.any() else sizes.max())


def problem_of(gramian: Gramian | Array, u: Array, c: float) -> Problem:
    """The dual of one Gram matrix, kept centred or plain, whichever loses no digits."""
    if isinstance(gramian, Gramian):
        h, inner = gramian.h.cpu().numpy(), gramian.H.cpu().numpy()
        return Problem.build(float(gramian.n0), h, (inner + inner.T) / 2, u, c)
    G = (gramian + gramian.T) / 2
    b = G @ u
    n0 = float(b @ u)
    H = G - b[:, None] - b + n0
    # Every gradient longer than half the mean, and none so near it that its distance is rounding: centring subtracts
    # nothing that is needed.
    if NEAR * n0 <= H.diagonal().min() and H.diagonal().max() <= n0 / 4:
        return Problem.build(n0, b - n0, H, u, c)
    return Problem.build(0.0, np.zeros(len(G)), G, u, c)
