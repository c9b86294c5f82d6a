"""Rank collapse: with clients of different ranks, what only the high-rank clients can say is diluted by the mean.

Adding clients of rank 4 and of rank 16 with weights that know nothing of ranks lets the first four directions add up
over all clients and the rest over some, so that the energy of the aggregate gathers in the smallest rank that all
share; sent back truncated and trained on, it does so at a geometric rate over rounds (arXiv:2602.13486). Seen from one
round, with ``r`` the smallest client rank of a module and ``tail_r(X)`` the squared norm that the best rank-r
approximation of X leaves out:

    aggregate share  =  tail_r(dW) / ||dW||^2
    clients' share   =  sum_u w_u tail_r(dW_u) / sum_u w_u ||dW_u||^2      over the clients of rank above r
    retained         =  aggregate share / clients' share

Retained is near 1 where ranks do no harm, above 1 where clients point to different directions (their sum then fills
more dimensions than each of them), and small where the higher ranks drown. It counts as a collapse below ``RETAINED``,
if the clients use their higher ranks at all (clients' share of at least ``USED``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedgram import kernels

from .group import Group
from .svd import square_root

RETAINED = 0.5
USED = 0.01


@dataclass(frozen=True)
class RankCollapse:
    """One module whose clients' ranks differ, or several added up.

    Attributes:
        smallest_rank, largest_rank: of the clients (above 0).
        energy, beyond: ``||dW||^2`` and its part beyond the smallest rank.
        clients_energy, clients_beyond: weighted sums of the same over the clients of higher rank.
    """

    smallest_rank: int
    largest_rank: int
    energy: float
    beyond: float
    clients_energy: float
    clients_beyond: float

    @property
    def aggregate_share(self) -> float:
        """The aggregate's share of energy beyond the smallest rank."""
        return self.beyond / self.energy if self.energy > 0 else 0.0

    @property
    def clients_share(self) -> float:
        """The same in the updates of the clients of higher rank."""
        return self.clients_beyond / self.clients_energy if self.clients_energy > 0 else 0.0

    @property
    def retained(self) -> float:
        """What of the clients' share is left in the aggregate; 1 where they have none."""
        return self.aggregate_share / self.clients_share if self.clients_share > 0 else 1.0

    @property
    def collapsed(self) -> bool:
        """Whether the higher ranks are used and drown."""
        return self.energy > 0 and self.clients_share >= USED and self.retained < RETAINED

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("smallest_rank", "largest_rank", "aggregate_share", "clients_share", "retained", "collapsed")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def total(parts: Iterable[RankCollapse | None]) -> RankCollapse | None:
        """All modules with differing ranks together, or None."""
        kept = [part for part in parts if part is not None]
        if not kept:
            return None
        sums = (sum(getattr(p, f) for p in kept) for f in ("energy", "beyond", "clients_energy", "clients_beyond"))
        return RankCollapse(min(p.smallest_rank for p in kept), max(p.largest_rank for p in kept), *sums)


def rank_collapses(
    group: Group, energies: Sequence[float], curves: Sequence[Sequence[float]]
) -> list[RankCollapse | None]:
    """Per module of a group; None where the clients' ranks do not differ.

    Args:
        group: modules whose clients have the same ranks; no anchors.
        energies: ``||dW||^2`` of every module.
        curves: rho of the best pair of rank 1, 2, .. of every module.
    """
    ranks = [r for r in group.ranks if r > 0]
    if len(set(ranks)) < 2:
        return [None] * len(group.targets)
    low, high = min(ranks), max(ranks)
    mass, beyond = torch.zeros(2, len(group.targets), dtype=torch.float64, device="cpu")
    for u, rank in enumerate(group.ranks):
        if rank > low:
            values = _client_energies(group, u)
            mass += (group.weights[:, u : u + 1] * values).sum(-1).cpu()
            beyond += (group.weights[:, u : u + 1] * values[:, low:]).sum(-1).cpu()
    return [
        RankCollapse(low, high, energy, energy * _left_out(curve, low), float(mass[i]), float(beyond[i]))
        for i, (energy, curve) in enumerate(zip(energies, curves, strict=True))
    ]


def _left_out(curve: Sequence[float], rank: int) -> float:
    return curve[rank - 1] ** 2 if rank <= len(curve) else 0.0


def _client_energies(group: Group, u: int) -> Tensor:
    """(L, r_u) squared singular values of one client's update in every module, descending."""
    if group.gram is None:
        B, A = kernels.factor_gram(
            [[t.B[u]] for t in group.targets], [[t.A[u]] for t in group.targets], precise=True, backend=group.backend
        )
        scales = torch.stack([t.scalings[u] ** 2 for t in group.targets]).to(group.device).view(-1, 1, 1)
        G_B, G_A = torch.stack(B) * scales, torch.stack(A)
    else:
        own = group.member == u
        G_B, G_A = (group.gram[side][:, own][:, :, own] for side in ("B", "A"))
    root = square_root(G_A)
    return torch.linalg.eigvalsh(root.mT @ G_B @ root).clamp_min(0.0).flip(-1)
