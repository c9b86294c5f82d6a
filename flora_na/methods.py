"""The ladder of estimators (MATH.md 1.2), each starting from the one below."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .als import AlternatingLeastSquares
from .coefficients import Pair, fit_rank
from .divergence import energies
from .fedavg import scalar_pair, solve_fedavg
from .group import Group
from .scalar import ScalarLeastSquares
from .svd import solve_svd

METHODS = ("fedavg", "flora-na", "als", "svd", "stack")
COEFFICIENT_METHODS = METHODS[:-1]


def check_method(method: str, rank: int | None, shared: bool) -> None:
    """Raise ValueError unless method, rank and scope go together."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected a positive integer or None, got {rank!r}")
    if rank is not None and method == "stack":
        raise ValueError("rank: method 'stack' keeps every client's factors, so its rank is the sum of theirs")
    if shared and method != "flora-na":
        raise ValueError(f"shared: one pair of coefficients for all modules exists for 'flora-na' only, not {method!r}")


def solve(groups: Sequence[Group], method: str, rank: int | None = None, *, shared: bool = False) -> list[Pair]:
    """Coefficients of the estimate for every group.

    ``rank=None`` is each group's largest member rank. Where dW is zero (B = 0 in the first round), every method
    returns the averaged factors, with status ``zero-target``.
    """
    if method == "fedavg":
        pairs = [solve_fedavg(group, rank) for group in groups]
    elif method == "flora-na":
        found = ScalarLeastSquares().solve(groups, shared=shared)
        pairs = [scalar_pair(g, s.p, s.q, rank, s.status, s.sweeps) for g, s in zip(groups, found, strict=True)]
    elif method == "als":
        starts = solve(groups, "flora-na")
        pairs = [
            AlternatingLeastSquares().solve(group, start, group.rank if rank is None else rank)
            for group, start in zip(groups, starts, strict=True)
        ]
    else:
        pairs = [solve_svd(group, group.rank if rank is None else rank) for group in groups]
    return pairs


def zero_targets(group: Group, pair: Pair) -> Tensor:
    """(L,) where dW is zero, so that no estimate but the average means anything."""
    if group.gram is None:
        return (pair.P == 0).all(-1).all(-1)
    return energies(group) == 0


def with_averages(group: Group, pair: Pair, zero: Tensor) -> Pair:
    """The pair with averaged factors in the modules where dW is zero."""
    rank, average = pair.P.shape[-1], solve_fedavg(group)
    chosen = zero.view(-1, 1, 1)
    P = torch.where(chosen, fit_rank(average.P, rank), pair.P)
    return Pair(P, torch.where(chosen, fit_rank(average.Q, rank), pair.Q), pair.status, pair.sweeps)
