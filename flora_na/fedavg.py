"""The FedIT rule: averaged factors, the baseline every user has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedgram import kernels

from ._scalar_solver import certified_pair
from .coefficients import AnyPair, Ended, Pair, ScalarPair, balance, balanced_coefficients, fit_rank
from .combination import combine
from .energies import ROUNDING, column_masses
from .group import Group

SHARP = 1e-4
"""Rounding of the Grams above this part of a product can be seen in how it is cut."""


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
    return cut(group, pair, rank)


def cut(group: Group, pair: AnyPair, rank: int) -> Pair:
    """The best pair of a smaller rank within the product of ``pair``, balanced.

    From Grams; where factors cancel so far that what is left is not clear of the rounding of their squares, from QR of
    the factors themselves.
    """
    found = balance(group, pair, rank)
    size_B, size_A = (mass.square().sum(-1) for mass in column_masses(group, pair))
    kept = (found.P * group.apply("B", found.P)).sum(-2).square().sum(-1)  # of a balanced pair
    ids = (ROUNDING["float64"] * size_B * size_A > SHARP**2 * kept).nonzero().flatten().tolist()
    if not ids:
        return found
    part, whole = group.subset(ids), Pair(pair.P[ids], pair.Q[ids], pair.status)
    [(B, A)] = combine([(part, whole)], torch.float64)
    P, Q = found.P.clone(), found.Q.clone()
    triangles = kernels.factor_triangle([[b] for b in B], [[a] for a in A])
    for i, R_B, R_A in zip(ids, *triangles, strict=True):
        X_B, X_A = balanced_coefficients(R_B.to(group.device), R_A.to(group.device))
        P[i], Q[i] = fit_rank(pair.P[i] @ X_B, rank), fit_rank(pair.Q[i] @ X_A, rank)
    return replace(found, P=P, Q=Q)
