"""Modules whose clients have the same ranks, as the batched estimators see them: products with their Grams."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgram import kernels

from ._batched_algebra import layout_of, positions_of
from .energies import ROUNDING
from .group import ModuleFactors, implicit_product
from .grouping import stacked
from .members import SIDES, Side

PORTION_BYTES = 1 << 30
"""Grams that exist at one time where they are only needed for norms."""


class BatchedGroup:
    """L modules of equal client ranks, total rank R.

    Attributes:
        weights: (U,) float64, sum 1.
        D: (R, 1) float64, the weight of every stacked row.
        scale: (R, 1) float64 per side, ``sign(s) sqrt|s|`` for B and ``sqrt|s|`` for A.
        gram: G_B and G_A of the scaled factors, (L, R, R) float64, or None where R is too large.
        energy: (L,) ``||dW||^2``.
        norms: (L, R) per side: of the scaled columns of Bs, and rows of As.
        mass: (L,) what may cancel within dW: the sum of the norms of its rank-one terms.
        index: (L,) positions of the modules in the call.
    """

    def __init__(
        self,
        B: ModuleFactors,
        A: ModuleFactors,
        ranks: tuple[int, ...],
        ids: list[int],
        weights: Tensor,
        scalings: Tensor,
        *,
        formed: bool,
        precise: bool,
        backend: str,
    ) -> None:
        self.B, self.A, self.ranks, self.precise, self.backend = B, A, ranks, precise, backend
        self.modules, self.total_rank, self.rank = len(ids), sum(ranks), max(ranks)
        traced = torch.compiler.is_compiling()  # a trace holds them as constants
        layout = layout_of.__wrapped__ if traced else layout_of
        positions = positions_of.__wrapped__ if traced else positions_of
        self.member, self.membership, self.selector = layout(ranks, weights.device)
        self.index = positions(tuple(ids), weights.device)
        self.weights = weights
        self.D = weights[self.member].unsqueeze(-1)
        root = scalings.abs().sqrt()
        self.scale: dict[Side, Tensor] = {
            "B": (scalings.sign() * root)[self.member].unsqueeze(-1), "A": root[self.member].unsqueeze(-1)
        }  # fmt: skip
        self.gram: dict[Side, Tensor] | None = None
        energies: list[Tensor] = []
        diagonals: dict[Side, list[Tensor]] = {"B": [], "A": []}
        step = self.modules if formed else max(1, PORTION_BYTES // (16 * max(1, self.total_rank) ** 2))
        for start in range(0, self.modules, step):
            part = slice(start, start + step)
            gram = self._grams(B if step >= self.modules else B[part], A if step >= self.modules else A[part])
            energies.append(((gram["B"] * gram["A"]) @ self.D * self.D).sum((-2, -1)))
            for side in SIDES:
                diagonals[side].append(gram[side].diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())
            self.gram = gram if formed else None
        self.energy = torch.cat(energies)
        self.norms = {side: torch.cat(parts) for side, parts in diagonals.items()}
        self.mass = (self.D.squeeze(-1) * self.norms["B"] * self.norms["A"]).sum(-1)

    def _grams(self, B: ModuleFactors, A: ModuleFactors) -> dict[Side, Tensor]:
        G_B, G_A = kernels.factor_gram(B, A, precise=self.precise, backend=self.backend)
        in_one = torch.stack if torch.compiler.is_compiling() else stacked
        return {
            "B": in_one(G_B).mul_(self.scale["B"]).mul_(self.scale["B"].mT),
            "A": in_one(G_A).mul_(self.scale["A"]).mul_(self.scale["A"].mT),
        }

    def apply(self, side: Side, X: Tensor) -> Tensor:
        """``G_side @ X`` for (L, R, k) float64; without Grams in two reads of the factors."""
        if self.gram is not None:
            return self.gram[side] @ X
        scale = self.scale[side]
        return scale * implicit_product(side, self.B if side == "B" else self.A, scale * X, self.backend)

    @property
    def rounding(self) -> float:
        """The relative error of products without Grams (of which a GPU keeps one factor in float32)."""
        return ROUNDING["float64" if self.weights.device.type == "cpu" else "float32"]

    def expand(self, p: Tensor) -> Tensor:
        """Scalars per client (L, U) as coefficient blocks (L, R, rank)."""
        return p[:, self.member].unsqueeze(-1) * self.selector

    def sum_clients(self, rows: Tensor) -> Tensor:
        """Add up values (L, R) over each client's rows: (L, U)."""
        return rows @ self.membership
