"""The FedIT rule: averaged factors, the baseline every user has."""

from __future__ import annotations

from torch import Tensor

from ._scalar_solver import certified_pair
from .coefficients import AnyPair, Ended, Pair, ScalarPair, balance, fit_rank
from .group import Group


def solve_fedavg(group: Group, rank: int | None = None) -> AnyPair:
    """``B = sum w_u B_u``, ``A = sum w_u A_u``, zero-padded to the largest rank.

    A smaller ``rank`` returns the best pair of that rank within the averaged product.
    """
    found = certified_pair(group) if rank is None or rank == group.rank else None
    if found is not None:
        return found
    return scalar_pair(group, group.weights, group.weights, rank, "closed-form", 0)


def scalar_pair(
    group: Group, p: Tensor, q: Tensor, rank: int | None, status: str, sweeps: int, ended: Ended | None = None
) -> AnyPair:
    """The pair of one scalar per member and side (L, M), cut to ``rank`` or padded with zero columns."""
    pair = ScalarPair(group, p, q, status, sweeps, ended=ended)
    if rank is None or rank == group.rank:
        return pair
    if rank > group.rank:
        return Pair(fit_rank(pair.P, rank), fit_rank(pair.Q, rank), status, sweeps, ended=ended)
    return balance(group, pair, rank)
