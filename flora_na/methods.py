"""The ladder of estimators (docs/math.md 1.2), each starting from the one below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._scalar_problem import even_norms
from ._scalar_solver import doubtful_modules
from .als import AlternatingLeastSquares
from .coefficients import AnyPair, Pair, fit_rank, trace_product
from .divergence import pair_errors
from .energies import energies, mass_of_pair
from .fedavg import scalar_pair, solve_fedavg
from .group import Group
from .members import SIDES
from .rank_choice import Rank, check_rank
from .scalar import ScalarLeastSquares
from .svd import blurred, by_krylov, certified_optimum, doubtful_optima, settle, solve_svd

METHODS = ("fedavg", "flora-na", "als", "svd", "stack")
COEFFICIENT_METHODS = METHODS[:-1]


def check_method(method: str, rank: Rank, shared: bool) -> None:
    """Raise ValueError unless method, rank and scope go together."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    check_rank(rank)
    if rank is not None and method == "stack":
        raise ValueError("rank: method 'stack' keeps every client's factors, so its rank is the sum of theirs")
    if shared and method != "flora-na":
        raise ValueError(f"shared: one pair of coefficients for all modules exists for 'flora-na' only, not {method!r}")


def solve(groups: Sequence[Group], method: str, rank: int | None = None, *, shared: bool = False) -> list[AnyPair]:
    """Coefficients of the estimate for every group.

    ``rank=None`` is each group's largest member rank. Where dW is zero (B = 0 in the first round) the pair means
    nothing: see ``with_averages``.
    """
    if method == "fedavg":
        pairs = [solve_fedavg(group, rank) for group in groups]
    elif method == "flora-na" and shared:
        pairs = _solve_shared(groups, [rank] * len(groups))
    elif method == "flora-na":
        pairs = [_solve_scalars(group, rank) for group in groups]
    elif method == "als":
        pairs = [_solve_blocks(group, rank) for group in groups]
    else:
        pairs = [solve_svd(group, group.rank if rank is None else rank) for group in groups]
    return pairs


def doubtful_apart(
    groups: Sequence[tuple[Group, list[int]]], method: str, ranks: Sequence[int | None]
) -> tuple[list[tuple[Group, list[int]]], list[int | None]]:
    """The groups, each with its modules' positions and rank, cut in two where some modules only need the general path.

    What the compiled solvers leave to it, because their Grams leave doubt (a module that is zero, clients
    that are alike), would take the other modules of a group with it, to a path that is many times as slow.
    """
    parts: list[tuple[Group, list[int]]] = []
    of_parts: list[int | None] = []
    for (group, ids), rank in zip(groups, ranks, strict=True):
        doubtful = set(_doubtful(group, method, rank)) if len(ids) > 1 else set()
        both = [[i for i in range(len(ids)) if (i in doubtful) == side] for side in (False, True)]
        if all(both):
            parts += [(group.subset(own), [ids[i] for i in own]) for own in both]
        else:
            parts.append((group, ids))
        of_parts += [rank] * (len(parts) - len(of_parts))
    return parts, of_parts


def _doubtful(group: Group, method: str, rank: int | None) -> list[int]:
    if method in ("als", "svd"):
        return doubtful_optima(group, group.rank if rank is None else rank)
    return doubtful_modules(group) if method == "fedavg" else ScalarLeastSquares().doubtful(group)


def _solve_blocks(group: Group, rank: int | None) -> AnyPair:
    """By sweeps from ``flora-na``'s pair; from the optimum's rows where they cost less, which leaves one sweep to do.

    So too where they may show what sweeps with Grams cannot: in float64.
    """
    wanted = group.rank if rank is None else rank
    if not by_krylov(group):
        fine = group.targets[0].dtype == torch.float64
        optimum = solve_svd(group, wanted) if fine else certified_optimum(group, wanted)
        if optimum is not None:
            return replace(optimum, status="converged", sweeps=1)
    [start] = solve([group], "flora-na", rank if rank is not None and rank < group.rank else None)
    pair = settle(group, AlternatingLeastSquares().solve(group, start, min(wanted, group.total_rank)))
    return replace(pair, P=fit_rank(pair.P, wanted), Q=fit_rank(pair.Q, wanted))


def _solve_scalars(group: Group, rank: int | None) -> AnyPair:
    solver = ScalarLeastSquares()
    if rank is None or rank == group.rank:
        found = solver.certified(group)
        if found is not None:
            return found
    [s] = solver.solve([group])
    return _no_worse(group, scalar_pair(group, s.p, s.q, rank, *s.ended(group)), s.left, rank)


def _solve_shared(groups: Sequence[Group], ranks: Sequence[int | None]) -> list[AnyPair]:
    """One p and q for all modules, each pair cut to its rank; the averages, should these then be better in all.

    The scalars are the best before they are cut, not after.
    """
    found = ScalarLeastSquares().solve(groups, shared=True)
    every = list(zip(groups, ranks, strict=True))
    pairs = [scalar_pair(g, s.p, s.q, rank, *s.ended(g)) for (g, rank), s in zip(every, found, strict=True)]
    if not any(rank is not None and rank < g.rank for g, rank in every):
        return pairs
    averages = [_even(g, solve_fedavg(g, rank)) for g, rank in every]
    if _total_error(groups, pairs) <= _total_error(groups, averages):
        return pairs
    return [
        _choose(p, a, torch.ones_like(energies(g), dtype=torch.bool))
        for g, p, a in zip(groups, pairs, averages, strict=True)
    ]


def _total_error(groups: Sequence[Group], pairs: Sequence[AnyPair]) -> float:
    return sum(float(pair_errors(g, p).error.sum()) for g, p in zip(groups, pairs, strict=True))


def _no_worse(group: Group, pair: AnyPair, left: Tensor, rank: int | None) -> AnyPair:
    """The pair, with averaged factors in modules where the scalars are worse.

    That can be below what their equations resolve, and where both are cut to a smaller rank.
    """
    cut = rank is not None and rank < group.rank
    blur = torch.ones_like(left, dtype=torch.bool) if cut else blurred(group, left, mass_of_pair(group, pair))
    ids = blur.nonzero().flatten().tolist()
    if not ids:
        return pair
    part, average = group.subset(ids), solve_fedavg(group, rank)
    errors = [pair_errors(part, Pair(p.P[ids], p.Q[ids], "")).error for p in (pair, average)]
    worse = torch.zeros_like(left, dtype=torch.bool)
    worse[ids] = ~(errors[0] <= errors[1])
    return _choose(pair, _even(group, average), worse) if bool(worse.any()) else pair


def _even(group: Group, pair: AnyPair) -> AnyPair:
    """The pair with norms of B and A within a factor of two, as the scalars' are; an anchor fixes them."""
    if group.anchored:
        return pair
    b, a = (trace_product(X, group.apply(side, X)) for side, X in zip(SIDES, (pair.P, pair.Q), strict=True))
    c = even_norms(b, a).view(-1, 1, 1)
    return Pair(pair.P * c, pair.Q / c, pair.status)


def _choose(pair: AnyPair, other: AnyPair, chosen: Tensor) -> Pair:
    """The pair, with the coefficients of another where ``chosen`` (L,)."""
    at, rank = chosen.view(-1, 1, 1), pair.P.shape[-1]
    P = torch.where(at, fit_rank(other.P, rank), pair.P)
    return Pair(P, torch.where(at, fit_rank(other.Q, rank), pair.Q), pair.status, pair.sweeps, ended=pair.ended)


def solve_each(
    groups: Sequence[Group], method: str, ranks: Sequence[int | None], *, shared: bool = False
) -> list[AnyPair]:
    """``solve`` with a rank of its own for every group."""
    if len(set(ranks)) <= 1:
        return solve(groups, method, ranks[0] if ranks else None, shared=shared)
    if shared:
        return _solve_shared(groups, ranks)
    return [solve([group], method, rank)[0] for group, rank in zip(groups, ranks, strict=True)]


def with_averages(group: Group, pair: AnyPair) -> AnyPair:
    """The pair with averaged factors where dW is zero: no estimate but the average means anything there."""
    zero = energies(group) == 0
    return _choose(pair, solve_fedavg(group), zero) if bool(zero.any()) else pair
