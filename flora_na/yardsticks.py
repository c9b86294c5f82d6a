"""What an estimate is held against: the divergence of averaged factors, and of the best pair of the same rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .divergence import Errors, pair_errors
from .energies import energies
from .fedavg import solve_fedavg
from .group import Group
from .svd import by_krylov, optimum_error, solve_svd, unresolved


@dataclass(frozen=True, eq=False)
class Yardsticks:
    """Computed when first asked for, from the Grams that are there already."""

    group: Group
    rank: int

    @cached_property
    def fedavg(self) -> Errors:
        """Errors of the averaged factors (FedIT), at this rank."""
        rank = min(self.rank, self.group.rank)
        known = self.group.memo.average_errors
        if rank == self.group.rank and known is not None:
            return Errors(energies(self.group), known)
        return pair_errors(self.group, solve_fedavg(self.group, rank))

    @cached_property
    def optimal(self) -> Errors:
        """Errors of the best pair of this rank (Eckart-Young)."""
        if self.rank >= self.group.total_rank:
            energy = energies(self.group)
            return Errors(energy, torch.zeros_like(energy))
        if by_krylov(self.group):
            return pair_errors(self.group, solve_svd(self.group, self.rank))
        error = optimum_error(self.group, self.rank)
        doubtful = unresolved(self.group, error)
        if bool(doubtful.any()):
            exact = pair_errors(self.group, solve_svd(self.group, self.rank)).error
            error = torch.where(doubtful, exact, error)
        return Errors(energies(self.group), error)
