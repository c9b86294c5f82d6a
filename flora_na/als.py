"""Alternating least squares over rank-r pairs: block power iteration on dW, in Gram space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._block_solver import certified_blocks
from .coefficients import AnyPair, Pair, balance, inverse_or_zero, orthonormaliser
from .energies import energies, factor_norms
from .group import Group
from .members import Side

CANCELLED = 2.0**-24
"""A combination of factors this small beside its terms is rounding: the square root of what float64 Grams resolve."""

IMPLICIT_FLOOR = 1e-11
"""Squared errors below this part of ``||dW||^2`` are lost in the orthonormalisations of the implicit regime."""
TILT = 2.0**-7
"""How much of a sketch the rows have that sweeps start from."""
RESOLVED = 2.0**-50
"""A gain below this part of what is captured is rounding."""


@dataclass(frozen=True)
class AlternatingLeastSquares:
    """``B = sum B_u P_u``, ``A = sum Q_u A_u`` with free blocks (docs/math.md 1.3).

    Fix A, orthonormalise its rows: the best B is ``dW A^T``, in coefficients ``P = D G_A Q``. Then the mirror image.
    The squared error never rises and converges to the rank-r optimum at rate (sigma_{r+1} / sigma_r)^2, from a start
    that has a little of all members' rows.

    Attributes:
        tolerance: stop once a sweep lowers the squared error by less than this fraction of it.
        max_sweeps: an upper bound on the sweeps.
    """

    tolerance: float = 1e-6
    max_sweeps: int = 200

    def solve(self, group: Group, start: AnyPair, rank: int | None = None) -> Pair:
        """Improve ``start`` (any rank) to the best pair of rank ``rank`` (default: its own) that the sweeps reach.

        Returns:
            A balanced pair; status ``converged`` or ``max-sweeps``, and the sweeps.
        """
        rank = start.P.shape[-1] if rank is None else rank
        Q = starting_rows(group, start, rank)
        if self.max_sweeps > 1 and rank < group.total_rank:
            Q = tilted(Q, _sketch(group, rank), factor_norms(group))
        found = certified_blocks(group, Q, tolerance=self.tolerance, max_sweeps=self.max_sweeps, cancelled=CANCELLED)
        return self._swept(group, Q) if found is None else found

    def _swept(self, group: Group, Q: Tensor) -> Pair:
        """From the rows Q by products with the Grams, all modules in step."""
        zero = energies(group) == 0
        captured = torch.zeros(len(group.targets), dtype=torch.float64, device=group.device)
        P, Q_hat = _first_half_step(group, Q, fill=self.max_sweeps > 1)
        status, sweep = "max-sweeps", 0
        for sweep in range(1, self.max_sweeps + 1):
            before = captured
            Q, _, captured = half_step(group, "B", P)
            P, Q_hat, _ = half_step(group, "A", Q)
            if bool((self._settled(group, before, captured) | zero).all()):
                status = "converged"
                break
        return balance(group, Pair(P, Q_hat, status, sweep), Q.shape[-1])

    def _settled(self, group: Group, before: Tensor, captured: Tensor) -> Tensor:
        """(L,) where a sweep gained too little to go on, or no more than rounding."""
        formed = group.gram is not None
        energy, floor = (group.gram_energy, 1e-13) if formed else (energies(group), IMPLICIT_FLOOR)
        left = (energy - captured).clamp_min(floor * energy)
        return captured - before <= torch.maximum(self.tolerance * left, RESOLVED * captured)


def _first_half_step(group: Group, Q: Tensor, *, fill: bool) -> tuple[Tensor, Tensor]:
    """P for the rows Q, and these made orthonormal; ``fill`` puts other rows in the place of those that are lost.

    A start of lower rank (zero rows, dependent averages) would stay there: no sweep adds a direction.
    """
    P, Q_hat, _ = half_step(group, "A", Q)
    if fill and bool((lost := (Q_hat == 0).all(-2, keepdim=True)).any()):
        filled = torch.where(lost, _sketch(group, Q.shape[-1]), Q_hat)
        P, Q_hat, _ = half_step(group, "A", torch.where(lost.any(-1, keepdim=True), filled, Q))
    return P, Q_hat


def starting_rows(group: Group, start: AnyPair, rank: int) -> Tensor:
    """Coefficients (L, R, rank) of rows of A to start from; a fixed sketch fills what is lacking.

    It is by position: above the members' rank their order shows, within the tolerance of the sweeps.
    """
    Q = start.Q if start.Q.shape[-1] <= rank else balance(group, start, rank).Q
    missing = rank - Q.shape[-1]
    return Q if missing <= 0 else torch.cat([Q, _sketch(group, missing)], -1)


def tilted(Q: Tensor, sketch: Tensor, norms: dict[Side, Tensor]) -> Tensor:
    """Rows ``Q`` with a little of a sketch, both (L, R, k); rows of zeros stay so.

    Where members have no direction in common, no sweep would leave the span of the rows it starts from. By ``norms``
    (L, R) of the columns of Bs and rows of As, the sketch has of every row as much as it contributes to dW.
    """
    sketch = norms["B"].unsqueeze(-1) * sketch
    size, own = (torch.linalg.vector_norm(X * norms["A"].unsqueeze(-1), dim=1, keepdim=True) for X in (sketch, Q))
    return Q + TILT * own * inverse_or_zero(size) * sketch


def _sketch(group: Group, columns: int) -> Tensor:
    """(L, R, columns) fixed random combinations of rows of A."""
    generator = torch.Generator("cpu").manual_seed(0)
    sketch = torch.randn(group.total_rank, columns, dtype=torch.float64, generator=generator, device="cpu")
    return group.D.sqrt() * sketch.to(group.device)


def _cancellation(group: Group, side: Side, Y: Tensor) -> Tensor | None:
    """(L, r) norms below which a combination ``Y`` of the factors is rounding; unknown without Grams."""
    if group.gram is None:
        return None
    return CANCELLED * (group.row_norms[side].unsqueeze(-1) * Y.abs()).sum(1)


def half_step(group: Group, side: Side, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Given coefficients Y of one side, the least-squares coefficients X of the other.

    Returns:
        X, the orthonormalised Y (their pair is the new estimate), and ``||Y||^2`` in the metric of its Gram, which
        after a half-step on the other side is the captured part of ``||dW||^2``.
    """
    C = group.apply(side, Y)
    S = Y.mT @ C
    T = orthonormaliser(S, _cancellation(group, side, Y))
    return group.D * (C @ T), Y @ T, S.diagonal(dim1=-2, dim2=-1).sum(-1)
