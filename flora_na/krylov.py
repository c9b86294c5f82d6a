"""The best rank-r pair without Grams: a block Krylov space of dW, orthonormal in coefficients (Golub and Kahan)."""

from __future__ import annotations

import torch
from torch import Tensor

from .als import AlternatingLeastSquares, starting_rows
from .coefficients import Pair, fit_rank, inverse_or_zero, orthonormaliser
from .energies import energies
from .fedavg import solve_fedavg
from .group import Group

OVERSAMPLING = 8
TOLERANCE = 1e-8
"""Stop once one more block lowers the squared error by less than this fraction of it."""
MAX_BLOCKS = 64
DEPENDENT = 1e-5
"""A direction that loses all but this part of its length to the space already spanned is left out: the squares of what
is left are good to 1e-6 then."""
HELD = 0.9
"""A direction made to be of length 1 that is shorter than this when its products are taken again is rounding."""
AMISS = 1e-2
"""A pair that captures less than its space promised by this part of the squared error is given to sweeps."""
LOST = 10 * DEPENDENT**2
"""So is one whose squared error is below this part of ``||dW||^2``: what was left out as dependent counts there."""


def solve_krylov(group: Group, rank: int) -> Pair:
    """The best pair of rank ``rank`` in ``span{A^T, (dW^T dW) A^T, ...}`` of the averaged rows A and a fixed sketch.

    Where singular values lie close together, power iteration needs hundreds of sweeps; the space spanned by its
    iterates holds the answer after some ten. Each block costs one product with either Gram, linear in the clients.
    """
    wide = min(rank + OVERSAMPLING, group.total_rank)
    space = _Space(group)
    Y = starting_rows(group, solve_fedavg(group), wide)
    energy, before, status, blocks = energies(group), None, "max-sweeps", 0
    for blocks in range(1, MAX_BLOCKS + 1):
        Y = space.extend(Y)
        captured = torch.linalg.eigvalsh(space.H)[:, -rank:].sum(-1)
        left = (energy - captured).clamp_min(1e-13 * energy)
        if before is not None and bool((captured - before <= TOLERANCE * left).all()):
            status = "converged"
            break
        before = captured
        if space.size >= group.total_rank or not Y.shape[-1]:
            status = "converged"
            break
    vectors = torch.linalg.eigh(space.H).eigenvectors[:, :, -min(wide, space.size) :]
    # coefficients of ill-conditioned factors are orthonormal to rounding times their condition only: one sweep from
    # the block, which orthonormalises again, takes the error that this leaves to rounding
    pair = AlternatingLeastSquares(max_sweeps=1).solve(group, Pair(space.P @ vectors, space.V @ vectors, status))
    pair = Pair(fit_rank(pair.P, rank), fit_rank(pair.Q, rank), status, blocks)
    left, lost = energy - captured, captured - _kept(group, pair)
    doubtful = (left < LOST * energy) | (lost.abs() > AMISS * left.abs() + 1e-12 * energy)
    return _swept(group, pair, doubtful.nonzero().flatten().tolist())


def _kept(group: Group, pair: Pair) -> Tensor:
    """(L,) what a balanced pair captures of ``||dW||^2``."""
    return (pair.P * group.apply("B", pair.P)).sum(-2).square().sum(-1)


def _swept(group: Group, pair: Pair, ids: list[int]) -> Pair:
    """The pair, with that of sweeps from it in the modules ``ids`` where these find more.

    Only there: sweeps start from rows tilted a little, and end within their tolerance of what they had.
    """
    if not ids:
        return pair
    part, start = group.subset(ids), Pair(pair.P[ids], pair.Q[ids], pair.status)
    found = AlternatingLeastSquares().solve(part, start)
    more = (_kept(part, found) > _kept(part, start)).tolist()
    P, Q, ended = pair.P.clone(), pair.Q.clone(), [(pair.status, pair.sweeps)] * len(pair.P)
    for at, (i, better) in enumerate(zip(ids, more, strict=True)):
        if better:
            P[i], Q[i], ended[i] = found.P[at], found.Q[at], (found.status, found.sweeps)
    return Pair(P, Q, pair.status, pair.sweeps, ended=tuple(ended))


class _Space:
    """Coefficients V of orthonormal rows ``V^T As``, their images ``P = D G_A V`` (``Bs P = dW (V^T As)^T``), and the
    small matrix ``H = P^T G_B P`` whose eigenvalues are the squared singular values that the space has found."""

    def __init__(self, group: Group) -> None:
        empty = group.D.new_zeros(len(group.targets), group.total_rank, 0)
        self.group, self.V, self.C, self.P = group, empty, empty, empty
        self.H = group.D.new_zeros(len(group.targets), 0, 0)

    @property
    def size(self) -> int:
        """The columns of V."""
        return self.V.shape[-1]

    def extend(self, Y: Tensor) -> Tensor:
        """Add the span of ``Y^T As``; returns the coefficients of its image under ``dW^T dW``.

        Of its singular directions one by one: beside the image of a large one, what is new in that of a small one
        would be lost.
        """
        group = self.group
        Y, C = self._added(Y)
        P = group.D * C
        Z = group.apply("B", P)
        corner, side = P.mT @ Z, self.P.mT @ Z
        corner = 0.5 * (corner + corner.mT)
        self.H = torch.cat([torch.cat([self.H, side], -1), torch.cat([side.mT, corner], -1)], -2)
        self.V, self.C, self.P = (torch.cat(pair, -1) for pair in ((self.V, Y), (self.C, C), (self.P, P)))
        return group.D * (Z @ torch.linalg.eigh(corner).eigenvectors)

    def _added(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal directions for what ``Y^T As`` adds, in coefficients, and their products with ``G_A``."""
        Y = Y * inverse_or_zero(Y.abs().amax(-2, keepdim=True))  # so that no square leaves float64's range
        C = self.group.apply("A", Y)
        length = _norms(Y, C)
        Y, C = self._outside(*self._outside(Y, C))
        Y = Y @ orthonormaliser(Y.mT @ C, DEPENDENT * length)
        Y, C = self._outside(Y, self.group.apply("A", Y))  # what has cancelled had left its rounding
        T = orthonormaliser(Y.mT @ C, torch.full_like(length, HELD))
        used = (T != 0).any(-2).any(0)
        return Y @ T[..., used], C @ T[..., used]

    def _outside(self, Y: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        inside = self.C.mT @ Y
        return Y - self.V @ inside, C - self.C @ inside


def _norms(Y: Tensor, C: Tensor) -> Tensor:
    return (Y * C).sum(-2).clamp_min(0.0).sqrt()
