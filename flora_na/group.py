"""Modules with the same member ranks, and their Gram matrices as operators on coefficients.

Everything an estimator does happens on coefficients: ``B = Bs P`` and ``A = Q^T As`` with P, Q of shape (R, r), where
``Bs`` (m, R) and ``As`` (R, n) stack the members' scaled factors. Then ``dW = Bs D As`` and an estimator needs only
products with ``G_B = Bs^T Bs`` and ``G_A = As As^T``. A group batches L modules: all tensors lead with L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from fedgram import kernels

from .members import Members, Side
from .target import Target

if TYPE_CHECKING:
    from ._spectrum_solver import CompiledSpectrum

Factors: TypeAlias = tuple[list[Tensor], list[Tensor]]
"""B and A of L modules, one each: of pairs, and of products with them."""
ModuleFactors: TypeAlias = Sequence[Sequence[Tensor]]
"""One side's factors of every module's members, ``[module][member]``."""
GRAM_RANK_LIMIT = 2048
SMALL_RANK = 512


def forms_grams(total_rank: int, length: int) -> bool:
    """The rule between the two regimes: whether R x R Grams are formed once, or products with them taken implicitly.

    Grams and their factorisations cost ``R^2 (m + n)`` and some ``R^3`` operations; without them iterations and exact
    norms cost some ``m n R``, linear in the clients. They meet near ``R = (m + n) / 2``. Grams above
    ``GRAM_RANK_LIMIT`` would take hundreds of megabytes; below ``SMALL_RANK`` they cost nothing either way.

    Args:
        total_rank: R, the members' ranks together.
        length: m + n, of the largest module.
    """
    return total_rank <= min(GRAM_RANK_LIMIT, max(SMALL_RANK, length // 2))


def implicit_product(side: Side, factors: ModuleFactors, X: Tensor, backend: str) -> Tensor:
    """Every module's Gram of one side, without scalings, times X (L, R, k) on the factors' device: (L, R, k).

    The Gram is never formed: combine the factors, then project on them (two reads of them).
    """
    dtype = torch.float64 if X.device.type == "cpu" else torch.float32
    if side == "B":
        combined, _ = kernels.factor_combine(factors, None, list(X), None, dtype=dtype, backend=backend)
        Y, _ = kernels.factor_cross(factors, None, combined, None, backend=backend)
    else:
        _, combined = kernels.factor_combine(None, factors, None, list(X.mT), dtype=dtype, backend=backend)
        _, Y = kernels.factor_cross(None, factors, None, combined, backend=backend)
    assert Y is not None
    return torch.stack(Y)


@dataclass(frozen=True, eq=False)
class Average:
    """The averaged factors of L modules.

    Attributes:
        factors: lists of B (m, r) and A (r, n).
        products: where they were asked for, per side those of the members' factors (without their scalings), and of
            the averaged ones as rounded, with the averaged ones: (L, R + r, r) float64.
    """

    factors: Factors
    products: tuple[Tensor, Tensor] | None = None

    def pick(self, ids: list[int]) -> Average:
        """Those of some of the modules."""
        B, A = ([x[i] for i in ids] for x in self.factors)
        products = None if self.products is None else (self.products[0][ids], self.products[1][ids])
        return Average((B, A), products)


@dataclass(eq=False)
class Memo:
    """What is computed once for a group, by those who name it.

    Attributes:
        energies: (L,) ``||dW||^2``, certified.
        average_errors: (L,) ``||dW - BA||^2`` of the averaged factors.
        singular_squares: (L, R) squared singular values of dW, descending.
        best_rows: by rank, the compiled spectrum with the optimum's rows; None where the group is not for it.
        scalars: by tolerances and most sweeps, what the compiled solver found.
        member_norms: without Grams, (L, R) per side: for every stacked row the norm of its member's factor.
    """

    energies: Tensor | None = None
    average_errors: Tensor | None = None
    singular_squares: Tensor | None = None
    best_rows: dict[int, CompiledSpectrum | None] = field(default_factory=dict)
    scalars: dict[tuple[tuple[float, float], int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    member_norms: dict[Side, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """L modules whose members have the same ranks, with the product by their Grams.

    Attributes:
        members: the modules, and who takes part in them.
        factors: the members' factors, module by module, described once for all operations on them.
        gram: G_B and G_A, each (L, R, R) float64 from float64 products, of the scaled factors; None in the implicit
            regime.
        average: the averaged factors (FedIT) of every module, where they were asked for.
        memo: what was computed once for the group.
    """

    members: Members
    factors: kernels.Described
    gram: dict[Side, Tensor] | None
    backend: str = "auto"
    average: Average | None = None
    memo: Memo = field(default_factory=Memo, repr=False)

    def apply(self, side: Side, X: Tensor) -> Tensor:
        """``G_side @ X`` for X of shape (L, R, k), float64."""
        if self.gram is not None:
            return self.gram[side] @ X
        factors = self.factors.B if side == "B" else self.factors.A
        scale = self.row_scale[side]
        return scale * implicit_product(side, factors, scale * X, self.backend)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The modules."""
        return self.members.targets

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the members, the anchor last."""
        return self.members.ranks

    @cached_property
    def rank(self) -> int:
        """The largest member rank: what fedavg and flora-na return."""
        return max(self.ranks)

    @property
    def total_rank(self) -> int:
        """R, the sum of the members' ranks."""
        return self.members.total_rank

    @property
    def anchored(self) -> bool:
        """Whether the last member is an anchor."""
        return self.targets[0].anchored

    @property
    def device(self) -> torch.device:
        """Where the Grams and the solves are; the factors may be on a GPU beside it."""
        return self.members.device

    @property
    def weights(self) -> Tensor:
        """(L, M) float64 weights of the members, 0 for the anchor; not to be written to."""
        return self.members.weights

    @property
    def member(self) -> Tensor:
        """(R,) the member that each stacked row belongs to."""
        return self.members.of_row

    @cached_property
    def slot(self) -> Tensor:
        """(R,) the position of each stacked row within its member."""
        return torch.cat([torch.arange(r, device=self.device) for r in self.ranks])

    @cached_property
    def selector(self) -> Tensor:
        """(R, rank) float64 zeros and ones: row j carries a one at its slot (zero-padding to the largest rank)."""
        return torch.nn.functional.one_hot(self.slot, max(self.rank, 1))[:, : self.rank].double()

    @cached_property
    def membership(self) -> Tensor:
        """(R, M) float64 zeros and ones: row j carries a one at its member."""
        return torch.nn.functional.one_hot(self.member, len(self.ranks)).double()

    @cached_property
    def D(self) -> Tensor:
        """(L, R, 1) float64: the weight of each stacked row, the diagonal of D."""
        return self.weights[:, self.member].unsqueeze(-1)

    @property
    def row_scale(self) -> dict[Side, Tensor]:
        """(L, R, 1) float64 per side: what every stacked row is multiplied by for its member's scaling."""
        return self.members.row_scale

    @cached_property
    def row_norms(self) -> dict[Side, Tensor]:
        """(L, R) float64 per side: the norms of the scaled columns of Bs, or rows of As."""
        assert self.gram is not None
        return {side: g.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt() for side, g in self.gram.items()}

    @cached_property
    def gram_energy(self) -> Tensor:
        """(L,) ``||dW||^2 = tr(G_B D G_A D)`` from the Grams, whatever their rounding makes of it."""
        assert self.gram is not None
        return ((self.gram["B"] * self.gram["A"]) @ self.D * self.D).sum((-2, -1))

    @cached_property
    def mass(self) -> Tensor:
        """(L,) the sum of the norms of the rank-one terms of dW: what may cancel within it."""
        return (self.D.squeeze(-1) * self.row_norms["B"] * self.row_norms["A"]).sum(-1)

    def subset(self, ids: list[int]) -> Group:
        """The group of some of its modules."""
        gram: dict[Side, Tensor] | None = None
        if self.gram is not None:
            gram = {side: g[ids] for side, g in self.gram.items()}
        average = None if self.average is None else self.average.pick(ids)
        members = Members(tuple(self.targets[i] for i in ids), self.device)
        return Group(members, self.factors.pick(ids), gram, self.backend, average)

    def expand(self, p: Tensor) -> Tensor:
        """Scalars per member (L, M) as coefficient blocks (L, R, rank)."""
        return p[:, self.member].unsqueeze(-1) * self.selector

    def sum_members(self, rows: Tensor) -> Tensor:
        """Add up values (L, R) over each member's rows: (L, M)."""
        return rows @ self.membership

    def member_blocks(self, matrix: Tensor) -> Tensor:
        """Add up (L, R, R) over the blocks of each pair of members: (L, M, M)."""
        return self.membership.mT @ (matrix @ self.membership)
