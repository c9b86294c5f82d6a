"""Singular values of dW and what follows from them: error against rank, effective rank, and rank by energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .divergence import pair_errors
from .energies import MARGIN, energies, rounding
from .group import Group
from .svd import core_values, solve_svd, squared_singular_values

AUTO = "auto:"
LARGEST_RANK = 1 << 14
"""Of a result: its Gram alone takes 2 GB there."""
CURVE_RANKS = 4
"""In the implicit regime, curves go up to this multiple of the largest client rank."""

Rank = int | str | None


def check_rank(rank: Rank) -> None:
    """Raise ValueError unless ``rank`` is None, from 1 to ``LARGEST_RANK``, or ``auto:`` and a share from 0 to 1."""
    fits = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= LARGEST_RANK)
    if not fits and not (isinstance(rank, str) and 0.0 < _share(rank) < 1.0):
        wanted = f"an integer from 1 to {LARGEST_RANK}, 'auto:SHARE' with 0 < SHARE < 1, or None"
        raise ValueError(f"rank: expected {wanted}, got {rank!r}")


def energy_share(rank: Rank) -> float | None:
    """The share of ``||dW||^2`` that ``auto:0.99`` asks for, or None for a fixed rank."""
    check_rank(rank)
    return _share(rank) if isinstance(rank, str) else None


def _share(text: str) -> float:
    try:
        return float(text.removeprefix(AUTO)) if text.startswith(AUTO) else math.nan
    except ValueError:
        return math.nan


def module_ranks(group: Group, rank: Rank) -> list[int]:
    """The rank of every module's result: the given one, that of the share, or for None the largest client rank."""
    share = energy_share(rank)
    if share is not None:
        return choose_ranks(group, share)
    return [group.rank if rank is None else int(rank)] * len(group.targets)


def split_by_rank(
    groups: Sequence[tuple[Group, list[int]]], rank: Rank
) -> tuple[list[tuple[Group, list[int]]], list[int | None]]:
    """Groups (each with its modules' positions) of one output rank each, and these ranks; None as it is."""
    if not isinstance(rank, str):
        return list(groups), [rank] * len(groups)
    return _split(groups, [module_ranks(group, rank) for group, _ in groups])


def at_least(
    groups: Sequence[tuple[Group, list[int]]], ranks: Sequence[int | None], least: Sequence[int]
) -> tuple[list[tuple[Group, list[int]]], list[int | None]]:
    """The same groups, split so that every module's rank is at least that of its position in ``least``."""
    chosen = [
        [group.rank if rank is None else rank] * len(ids) for (group, ids), rank in zip(groups, ranks, strict=True)
    ]
    wanted = [
        [max(r, least[i]) for r, i in zip(own, ids, strict=True)] for own, (_, ids) in zip(chosen, groups, strict=True)
    ]
    return (list(groups), list(ranks)) if wanted == chosen else _split(groups, wanted)


def _split(
    groups: Sequence[tuple[Group, list[int]]], wanted: Sequence[list[int]]
) -> tuple[list[tuple[Group, list[int]]], list[int | None]]:
    """Groups whose modules have one rank each, and these ranks."""
    parts: list[tuple[Group, list[int]]] = []
    ranks: list[int | None] = []
    for (group, ids), chosen in zip(groups, wanted, strict=True):
        for own in sorted(set(chosen)):
            at = [i for i, r in enumerate(chosen) if r == own]
            parts.append((group if len(at) == len(ids) else group.subset(at), [ids[i] for i in at]))
            ranks.append(own)
    return parts, ranks


def choose_ranks(group: Group, share: float) -> list[int]:
    """Per module, the smallest rank whose best pair keeps at least ``share`` of ``||dW||^2``.

    Where dW is zero it is the largest client rank: that of the averaged factors, which are returned then.
    """
    total = energies(group).tolist()
    if group.gram is None:
        return [_grow_rank(group.subset([i]), e, share) for i, e in enumerate(total)]
    return [_first_within(left, e, share) if e > 0 else group.rank for left, e in zip(tails(group), total, strict=True)]


def rank_curves(group: Group) -> list[list[float]]:
    """rho of the best pair of rank 1, 2, .., per module; empty where dW is zero.

    Up to rank ``min(m, n, R)``, where it is zero; in the implicit regime up to four times the largest client rank.
    """
    total = energies(group).tolist()
    if group.gram is None:
        found = [_leading(group.subset([i]), e, _limit(group, i)) for i, e in enumerate(total)]
    else:
        found = tails(group)
    return [
        (left[1:] / energy).clamp_max(1.0).sqrt().tolist() if energy > 0 else []
        for left, energy in zip(found, total, strict=True)
    ]


def tails(group: Group) -> list[Tensor]:
    """Per module (K + 1,) float64: ``||dW||^2`` that the best pair of rank 0 .. K leaves out, ``K = min(m, n, R)``.

    From the Grams; for modules where one of these is too small for Grams to resolve, from QR factors.
    """
    values = squared_singular_values(group)
    floors = (MARGIN * rounding(group) * group.mass**2).tolist()
    out = []
    for i, floor in enumerate(floors):
        left = _tail_sums(values[i, : _span(group, i)])
        if bool((left[:-1] < floor).any()):
            left = _tail_sums(core_values(group, i).square())
        out.append(left)
    return out


def effective_rank(curve: Sequence[float]) -> float:
    """``exp`` of the entropy of the singular values' shares in their sum (Roy and Vetterli 2007), from a full curve.

    Between 1 and the rank; NaN for an empty curve or one that was cut before it reached zero.
    """
    if not curve or curve[-1] > 0:
        return math.nan
    left = [1.0, *(rho * rho for rho in curve)]
    sigma = [math.sqrt(max(0.0, a - b)) for a, b in pairwise(left)]
    shares = [s / sum(sigma) for s in sigma if s > 0]
    return math.exp(-sum(p * math.log(p) for p in shares))


def _span(group: Group, i: int) -> int:
    """The largest rank that the dW of module ``i`` can have."""
    target = group.targets[i]
    return min(group.total_rank, target.B[0].shape[0], target.A[0].shape[1])


def _limit(group: Group, i: int) -> int:
    return min(CURVE_RANKS * group.rank, _span(group, i))


def _first_within(left: Tensor, energy: float, share: float) -> int:
    """The smallest rank of at least 1 that leaves out no more than the rest of the share."""
    enough = (left <= (1.0 - share) * energy).nonzero().flatten()
    return max(1, int(enough[0])) if len(enough) else max(1, len(left) - 1)


def _tail_sums(values: Tensor) -> Tensor:
    """Sums of (K,) descending values from position 0 .. K on: (K + 1,), the last exactly zero."""
    return torch.nn.functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))


def _leading(one: Group, total: float, rank: int) -> Tensor:
    """(rank + 1,) energies left out by the leading singular values of one module in the implicit regime.

    The last is the certified error of the pair, and the balanced pair's squared singular values lead up to it.
    """
    pair = solve_svd(one, rank)
    sigma = (pair.P * one.apply("B", pair.P)).sum(-2)[0]  # of a balanced pair, B^T B = diag(sigma)
    last = min(float(pair_errors(one, pair).error[0]), total) if rank < _span(one, 0) else 0.0
    left = last + _tail_sums(sigma.square())
    left[0] = total
    return left


def _grow_rank(one: Group, total: float, share: float) -> int:
    """Double the rank of a subspace iteration until it holds the share, then count its singular values."""
    if total == 0:
        return one.rank
    rank, limit = min(one.rank, _span(one, 0)), _span(one, 0)
    left = _leading(one, total, rank)
    while rank < limit and float(left[-1]) > (1.0 - share) * total:
        rank = min(limit, 2 * rank)
        left = _leading(one, total, rank)
    return _first_within(left, total, share)
