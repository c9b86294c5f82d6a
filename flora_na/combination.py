"""The factors that coefficients stand for: one read of the clients' factors, for all modules of all groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgram import kernels

from .coefficients import AnyPair, ScalarPair
from .group import Factors, Group
from .members import Side


def combine(
    groups: Sequence[tuple[Group, AnyPair]], dtype: torch.dtype | None = None, backend: str = "auto"
) -> list[Factors]:
    """The factors of all modules in one read of the clients' factors, or from the read that took the Grams.

    Returns:
        (list of B, list of A) per group.
    """
    known = [known_averages(group, pair) if dtype is None else None for group, pair in groups]
    rest = [groups[at] for at, found in enumerate(known) if found is None]
    combined = iter(_combined(rest, dtype, backend))
    return [next(combined) if found is None else found for found in known]


def known_averages(group: Group, pair: AnyPair) -> Factors | None:
    """The factors of the pair where the group has them already."""
    if group.average is None or not isinstance(pair, ScalarPair):
        return None
    is_average = torch.equal(pair.p, group.weights) and torch.equal(pair.q, group.weights)
    return group.average.factors if is_average else None


def _combined(groups: Sequence[tuple[Group, AnyPair]], dtype: torch.dtype | None, backend: str) -> list[Factors]:
    if not groups:
        return []
    factors = kernels.Described.joined([group.factors for group, _ in groups])
    B, A = kernels.factor_combine(factors.B, factors.A, *_all_coefficients(groups), dtype=dtype, backend=backend)
    return list(zip(_split(B or [], groups), _split(A or [], groups), strict=True))


def combine_with_products(groups: Sequence[tuple[Group, AnyPair]], backend: str) -> list[tuple[Factors, Factors]]:
    """Of every group its factors, and their products with the clients' factors and with themselves, in one read."""
    if not groups:
        return []
    factors = kernels.Described.joined([group.factors for group, _ in groups])
    (B, A), (X_B, X_A) = kernels.combine_products(
        factors.B, factors.A, *_all_coefficients(groups), precise=True, backend=backend
    )
    b, a, x_B, x_A = (_split(items, groups) for items in (B, A, X_B, X_A))
    return list(zip(zip(b, a, strict=True), zip(x_B, x_A, strict=True), strict=True))


def _all_coefficients(groups: Sequence[tuple[Group, AnyPair]]) -> tuple[list[Tensor], list[Tensor]]:
    P, Q = ([c for group, pair in groups for c in _coefficients(group, pair, side)] for side in ("B", "A"))
    return P, Q


def _coefficients(group: Group, pair: AnyPair, side: Side) -> Sequence[Tensor]:
    """Of every module, for the factors without their scalings and where these are: blocks, or one scalar per member."""
    where = group.targets[0].device
    if isinstance(pair, ScalarPair):
        x = pair.p if side == "B" else pair.q
        return kernels.moved(x if group.members.unscaled else x * group.members.scale[side], where).unbind()
    x = group.row_scale[side] * (pair.P if side == "B" else pair.Q)
    x = x if side == "B" else x.mT
    return x.unbind() if where.type == "cpu" else kernels.moved(x.contiguous(), where).unbind()


def _split(items: list[Tensor], groups: Sequence[tuple[Group, AnyPair]]) -> list[list[Tensor]]:
    """What belongs to the modules of each group."""
    rest = iter(items)
    return [[next(rest) for _ in group.targets] for group, _ in groups]
