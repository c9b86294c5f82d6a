"""Pairs of coefficients, their gauge, and the small dense algebra that all estimators share.

A pair ``(P, Q)``, both (L, R, r) float64, stands for ``B = Bs P`` and ``A = Q^T As`` of L modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from .group import Group

RELATIVE_CUTOFF = 1e-13
"""Directions of a unit-diagonal float64 Gram below this eigenvalue are rounding, not data."""

SQUARE_ROUNDING = 2.0**-50
"""Of a Gram's eigenvalues, for every column, as a part of the largest."""

RESOLVED = 1e-15
"""Singular values below this part of the largest are rounding of the float64 QR."""

SAFE_PIVOT = 1e-4
"""Above it for every pivot of a unit-diagonal Cholesky factor, no direction comes near ``RELATIVE_CUTOFF``."""


Ended: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """Coefficients of one estimate for every module of a group.

    Attributes:
        P: (L, R, r) float64, ``B = Bs P``.
        Q: (L, R, r) float64, ``A = Q^T As``.
        status: how the estimate was reached.
        sweeps: alternating sweeps used, 0 for closed forms.
        evidence: what is known of its errors already.
        ended: status and sweeps of every module, where they differ.
    """

    P: Tensor
    Q: Tensor
    status: str
    sweeps: int = 0
    evidence: Evidence | None = None
    ended: Ended | None = None


@dataclass(frozen=True, eq=False)
class ScalarPair:
    """The pair of one scalar per member and side, ``B = sum p_u B_u`` and ``A = sum q_u A_u``; blocks when asked for.

    Attributes:
        group: the modules.
        p, q: (L, M) float64.
        status, sweeps, ended: as of ``Pair``.
        evidence: what is known of its errors already.
    """

    group: Group
    p: Tensor
    q: Tensor
    status: str
    sweeps: int = 0
    evidence: Evidence | None = None
    ended: Ended | None = None

    @cached_property
    def P(self) -> Tensor:
        """(L, R, rank) float64, ``B = Bs P``."""
        return self.group.expand(self.p)

    @cached_property
    def Q(self) -> Tensor:
        """(L, R, rank) float64, ``A = Q^T As``."""
        return self.group.expand(self.q)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Errors of a pair in exact arithmetic, certified to three digits.

    Attributes:
        error: (L,) ``||dW - BA||^2``.
        norms: (L, 2) ``||B||`` and ``||A||``: how far rounding of the factors can move the product.
    """

    error: Tensor
    norms: Tensor


AnyPair = Pair | ScalarPair


def eigh_psd(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors of symmetric positive semidefinite matrices (..., r, r)."""
    values, vectors = torch.linalg.eigh(0.5 * (S + S.mT))
    return values.clamp_min(0.0), vectors


def orthonormaliser(S: Tensor, floor: Tensor | None = None) -> Tensor:
    """T (..., r, r) with ``T^T S T`` the identity on the numerical range of S and zero off it.

    S is scaled to unit diagonal first, so that columns of very different norms keep their directions. A column whose
    norm is below ``floor`` (..., r) has cancelled to rounding: it carries no direction and is left out.
    """
    norms = S.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    scale = inverse_or_zero(norms if floor is None else torch.where(norms > floor, norms, 0.0))
    values, vectors = eigh_psd(S * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    keep = values > RELATIVE_CUTOFF * S.shape[-1]
    return scale.unsqueeze(-1) * vectors * torch.where(keep, values, torch.inf).rsqrt().unsqueeze(-2)


def inverse_or_zero(x: Tensor) -> Tensor:
    """``1 / x`` where x is positive, else 0."""
    return torch.where(x > 0, x, torch.inf).reciprocal()


def solve_psd(H: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares solution of ``H x = g`` for (..., U, U) positive semidefinite H, and the gain ``g^T x >= 0``.

    On the CPU by Cholesky where H is safely definite, which costs a third of the eigenvalues'.
    """
    if H.device.type == "cpu" and (x := _solve_definite(H, g)) is not None:
        return x, (g * x).sum(-1).clamp_min(0.0)
    T = orthonormaliser(H)
    y = T.mT @ g.unsqueeze(-1)
    return (T @ y).squeeze(-1), (y * y).sum((-2, -1))


def _solve_definite(H: Tensor, g: Tensor) -> Tensor | None:
    """By Cholesky on the unit-diagonal matrix, or None unless every pivot is far from rounding."""
    scale = H.diagonal(dim1=-2, dim2=-1).rsqrt()
    L, info = torch.linalg.cholesky_ex(H * (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    if bool(info.any()) or not bool((L.diagonal(dim1=-2, dim2=-1) > SAFE_PIVOT).all()):
        return None
    return torch.cholesky_solve((g * scale).unsqueeze(-1), L).squeeze(-1) * scale


def trace_product(X: Tensor, Y: Tensor) -> Tensor:
    """Inner products ``<X, Y>`` over the last two axes."""
    return (X * Y).sum((-2, -1))


def balance(group: Group, pair: AnyPair, rank: int) -> Pair:
    """The best rank-``rank`` pair within the product, with ``B^T B = A A^T`` diagonal (docs/math.md 1.5).

    Where the product has lower rank, trailing columns are zero.
    """
    S_B = pair.P.mT @ group.apply("B", pair.P)
    S_A = pair.Q.mT @ group.apply("A", pair.Q)
    (b, V_B), (a, V_A) = eigh_psd(S_B), eigh_psd(S_A)
    core = (V_B * b.sqrt().unsqueeze(-2)).mT @ (V_A * a.sqrt().unsqueeze(-2))
    U, sigma, Vt = torch.linalg.svd(core, full_matrices=False)
    # singular values below this are rounding of their squares, which would be divided by its root
    resolved = sigma > math.sqrt(SQUARE_ROUNDING * sigma.shape[-1]) * sigma[..., :1]
    # the singular vectors of the product Bs P Q^T As, mapped back without an inverse of S_A or S_B
    root = inverse_or_zero(torch.where(resolved & (sigma > 1e-150), sigma, 0.0).sqrt()).unsqueeze(-2)
    P = pair.P @ ((V_A * a.sqrt().unsqueeze(-2)) @ Vt.mT * root)
    Q = pair.Q @ ((V_B * b.sqrt().unsqueeze(-2)) @ U * root)
    return Pair(fit_rank(P, rank), fit_rank(Q, rank), pair.status, pair.sweeps, ended=pair.ended)


def balanced_coefficients(R_B: Tensor, R_A: Tensor) -> tuple[Tensor, Tensor]:
    """For factors with QR triangles R_B (k, r) and R_A (l, r): what makes them balanced, (r, min(k, l)) each.

    Their product has the core ``R_B R_A^T``, nothing of which is squared.
    """
    U, sigma, Vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    inverse = torch.where(sigma > RESOLVED * sigma[:1], sigma, torch.inf).rsqrt()
    return R_A.mT @ (Vt.mT * inverse), R_B.mT @ (U * inverse)


def fit_rank(X: Tensor, rank: int) -> Tensor:
    """Cut or zero-pad the last axis to ``rank``."""
    return torch.nn.functional.pad(X[..., :rank], (0, max(0, rank - X.shape[-1])))
