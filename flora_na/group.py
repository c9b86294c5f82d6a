"""Modules with the same member ranks, and their Gram matrices as operators on coefficients.

Everything an estimator does happens on coefficients: ``B = Bs P`` and ``A = Q^T As`` with P, Q of shape (R, r), where
``Bs`` (m, R) and ``As`` (R, n) stack the members' scaled factors. Then ``dW = Bs D As`` and an estimator needs only
products with ``G_B = Bs^T Bs`` and ``G_A = As As^T``. A group batches L modules: all tensors lead with L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedgram import kernels

from .finite import is_finite
from .target import Target

Side = Literal["B", "A"]
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


class Operator(Protocol):
    """Products with the scaled Gram of one side."""

    def __call__(self, side: Side, X: Tensor) -> Tensor:
        """Return ``G_side @ X`` for X of shape (L, R, k), float64."""
        ...


@dataclass(frozen=True, eq=False)
class Group:
    """L modules whose members have the same ranks, with the product by their Grams.

    Attributes:
        targets: the modules.
        gram: G_B and G_A, each (L, R, R) float64, of the scaled factors; None in the implicit regime.
        apply: products with G_B and G_A.
        memo: what was computed once for the group.
    """

    targets: tuple[Target, ...]
    gram: dict[Side, Tensor] | None
    apply: Operator
    backend: str = "auto"
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the members, the anchor last."""
        return self.targets[0].ranks

    @cached_property
    def rank(self) -> int:
        """The largest member rank: what fedavg and flora-na return."""
        return max(self.ranks)

    @cached_property
    def total_rank(self) -> int:
        """R, the sum of the members' ranks."""
        return sum(self.ranks)

    @property
    def anchored(self) -> bool:
        """Whether the last member is an anchor."""
        return self.targets[0].anchored

    @property
    def device(self) -> torch.device:
        """Where the factors and the solves are."""
        return self.targets[0].device

    @cached_property
    def weights(self) -> Tensor:
        """(L, M) float64 weights of the members, 0 for the anchor."""
        return torch.stack([t.weights for t in self.targets]).to(self.device)

    @cached_property
    def member(self) -> Tensor:
        """(R,) the member that each stacked row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks)).to(self.device)

    @cached_property
    def slot(self) -> Tensor:
        """(R,) the position of each stacked row within its member."""
        return torch.cat([torch.arange(r) for r in self.ranks]).to(self.device)

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

    @cached_property
    def row_scale(self) -> dict[Side, Tensor]:
        """(L, R, 1) float64 per side: what every stacked row is multiplied by for its member's scaling."""
        s = torch.stack([t.scalings for t in self.targets]).to(self.device)[:, self.member].unsqueeze(-1)
        root = s.abs().sqrt()
        return {"B": s.sign() * root, "A": root}

    @cached_property
    def unscaled(self) -> bool:
        """Whether all scalings are 1."""
        return all(t.unscaled for t in self.targets)

    @cached_property
    def member_scale(self) -> dict[Side, Tensor]:
        """(L, M) float64 per side: what every member's factor is multiplied by for its scaling."""
        scales = {"B": [t.scale_B for t in self.targets], "A": [t.scale_A for t in self.targets]}
        return {side: torch.stack(x).to(self.device) for side, x in scales.items()}

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
        targets = tuple(self.targets[i] for i in ids)
        if self.gram is None:
            return Group(targets, None, ImplicitOperator(targets, self.backend), self.backend)
        gram: dict[Side, Tensor] = {side: g[ids] for side, g in self.gram.items()}
        return Group(targets, gram, GramOperator(gram), self.backend)

    def expand(self, p: Tensor) -> Tensor:
        """Scalars per member (L, M) as coefficient blocks (L, R, rank)."""
        return p[:, self.member].unsqueeze(-1) * self.selector

    def sum_members(self, rows: Tensor) -> Tensor:
        """Add up values (L, R) over each member's rows: (L, M)."""
        return rows @ self.membership

    def member_blocks(self, matrix: Tensor) -> Tensor:
        """Add up (L, R, R) over the blocks of each pair of members: (L, M, M)."""
        return self.membership.mT @ (matrix @ self.membership)


class GramOperator:
    """Products with Grams that were formed once."""

    def __init__(self, gram: dict[Side, Tensor]) -> None:
        self.gram = gram

    def __call__(self, side: Side, X: Tensor) -> Tensor:
        """``G_side @ X``."""
        return self.gram[side] @ X


class ImplicitOperator:
    """Products with Grams that are never formed: combine the factors, then project on them (two reads of them)."""

    def __init__(self, targets: Sequence[Target], backend: str) -> None:
        self.targets, self.backend = targets, backend
        self.B = [t.B for t in targets]
        self.A = [t.A for t in targets]
        rows = torch.repeat_interleave(torch.arange(len(targets[0].ranks)), torch.tensor(targets[0].ranks))
        device = targets[0].device
        self.scale = {
            "B": torch.stack([t.scale_B[rows] for t in targets]).unsqueeze(-1).to(device),
            "A": torch.stack([t.scale_A[rows] for t in targets]).unsqueeze(-1).to(device),
        }
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32

    def __call__(self, side: Side, X: Tensor) -> Tensor:
        """``G_side @ X`` in two reads of the factors."""
        X = self.scale[side] * X
        if side == "B":
            B, _ = kernels.factor_combine(self.B, None, list(X), None, dtype=self.dtype, backend=self.backend)
            Y, _ = kernels.factor_cross(self.B, None, B, None, backend=self.backend)
        else:
            _, A = kernels.factor_combine(None, self.A, None, list(X.mT), dtype=self.dtype, backend=self.backend)
            _, Y = kernels.factor_cross(None, self.A, None, A, backend=self.backend)
        return self.scale[side] * torch.stack(Y)


def make_groups(targets: Sequence[Target], backend: str = "auto") -> list[tuple[Group, list[int]]]:
    """Batch the modules by member ranks and take their Grams in one launch; with each group, its modules' positions.

    Raises:
        ValueError: a factor holds NaN or Inf (names the module, the client and the factor).
    """
    order: dict[tuple[int, ...], list[int]] = {}
    for i, target in enumerate(targets):
        order.setdefault(target.ranks, []).append(i)
    formed = [
        i
        for ranks, ids in order.items()
        if forms_grams(sum(ranks), max(sum(targets[i].B[0].shape[:1] + targets[i].A[0].shape[1:]) for i in ids))
        for i in ids
    ]
    grams = dict(zip(formed, _grams([targets[i] for i in formed], backend), strict=True))
    for target in (targets[i] for i in range(len(targets)) if i not in grams):
        check_finite(target)
    return [
        (_make_group([targets[i] for i in ids], [grams.get(i) for i in ids], backend), ids) for ids in order.values()
    ]


def _make_group(targets: list[Target], grams: list[tuple[Tensor, Tensor] | None], backend: str) -> Group:
    if grams[0] is None:
        return Group(tuple(targets), None, ImplicitOperator(targets, backend), backend)
    B, A = (_stacked([g[i] for g in grams if g is not None]) for i in range(2))
    if not all(t.unscaled for t in targets):
        B, A = _scaled(B, [t.scale_B for t in targets], targets), _scaled(A, [t.scale_A for t in targets], targets)
    gram: dict[Side, Tensor] = {"B": B, "A": A}
    return Group(tuple(targets), gram, GramOperator(gram), backend)


def _stacked(grams: list[Tensor]) -> Tensor:
    return grams[0].unsqueeze(0) if len(grams) == 1 else torch.stack(grams)  # one large Gram is not copied


def _scaled(grams: Tensor, scales: list[Tensor], targets: list[Target]) -> Tensor:
    """Grams (L, R, R) of factors that are multiplied by ``scales``, one per member."""
    rows = torch.repeat_interleave(torch.stack(scales), torch.tensor(targets[0].ranks), dim=1).to(grams.device)
    return grams * rows.unsqueeze(2) * rows.unsqueeze(1)


def _grams(targets: list[Target], backend: str) -> list[tuple[Tensor, Tensor]]:
    if not targets:
        return []
    G_B, G_A = kernels.factor_gram([t.B for t in targets], [t.A for t in targets], backend=backend)
    for target, b, a in zip(targets, G_B, G_A, strict=True):
        if not math.isfinite(float(b.trace() + a.trace())):
            check_finite(target)
    return list(zip(G_B, G_A, strict=True))


def check_finite(target: Target) -> None:
    """Raise ValueError naming the first member and factor of the module that holds NaN or Inf, if any does."""
    for member, pair in enumerate(zip(target.B, target.A, strict=True)):
        for name, factor in zip(("lora_B", "lora_A"), pair, strict=True):
            if not is_finite(factor):
                kind = "NaN" if bool(torch.isnan(factor).any()) else "Inf"
                raise ValueError(f"{target.name}: {name} of {target.label(member)} contains {kind}")
