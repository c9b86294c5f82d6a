"""The best rank-r pair (Eckart-Young), and the error against rank, from R x R matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedgram import kernels

from .als import AlternatingLeastSquares
from .coefficients import Pair, balance, eigh_psd, fit_rank
from .divergence import MARGIN, rounding
from .fedavg import solve_fedavg
from .group import Group

OVERSAMPLING = 8
RESOLVED = 1e-15
"""Singular values below this part of the largest are rounding of the float64 QR."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of dW from small matrices, with what maps them back to factors.

    With ``G_A = L L^T``, the squared singular values of ``dW = Bs D As`` are the eigenvalues of ``L^T D G_B D L``.

    Attributes:
        energies: (L, R) squared singular values, descending, float64.
        vectors: (L, R, R) eigenvectors, in the same order.
        L: (L, R, R) the square root of G_A.
    """

    energies: Tensor
    vectors: Tensor
    L: Tensor


def spectrum(group: Group) -> Spectrum:
    """The spectrum of every module's dW; needs the formed Grams."""
    assert group.gram is not None
    L = square_root(group.gram["A"])
    DL = group.D * L
    energies, vectors = eigh_psd(DL.mT @ (group.gram["B"] @ DL))
    return Spectrum(energies.flip(-1), vectors.flip(-1), L)


def square_root(G: Tensor) -> Tensor:
    """L with ``L L^T = G``: Cholesky where it exists, else from the eigenvectors."""
    L, info = torch.linalg.cholesky_ex(G)
    failed = info != 0
    if bool(failed.any()):
        values, vectors = eigh_psd(G[failed])
        L[failed] = vectors * values.sqrt().unsqueeze(-2)
    return L


def solve_svd(group: Group, rank: int) -> Pair:
    """The best pair of rank ``rank``, balanced; trailing columns are zero where dW has lower rank.

    Modules whose remaining error is too small for their Grams to resolve are solved again from QR factors, which
    resolve singular values down to 1e-16 of the largest. In the implicit regime it is subspace iteration with
    oversampling, run to a tight tolerance.
    """
    if group.gram is None:
        return _subspace_iteration(group, rank)
    s = spectrum(group)
    V = group.D * (s.L @ s.vectors[..., :rank])
    # A = V^T dW^T dW spans the right singular vectors without a division; one sweep normalises and polishes it
    Q = group.D * (group.gram["B"] @ V)
    pair = AlternatingLeastSquares(max_sweeps=1).solve(group, Pair(Q, Q, ""), V.shape[-1])
    P, Q = fit_rank(pair.P, rank), fit_rank(pair.Q, rank)
    for i in unresolved(group, s, rank).nonzero().flatten().tolist():
        P[i], Q[i] = _from_triangles(group, i, rank)
    return Pair(P, Q, "closed-form")


def unresolved(group: Group, s: Spectrum, rank: int) -> Tensor:
    """(L,) where the squared error of the optimum is not safely above the rounding of the Grams."""
    return s.energies[:, rank:].sum(-1) < MARGIN * rounding(group) * group.mass**2


def _from_triangles(group: Group, i: int, rank: int) -> tuple[Tensor, Tensor]:
    """Coefficients (R, rank) of module ``i`` from the SVD of ``R_B D R_A^T``, whose entries are not squared."""
    target = group.targets[i]
    [R_B], [R_A] = kernels.factor_triangle([target.B], [target.A])
    R_B, R_A = R_B * group.row_scale["B"][i].mT, R_A * group.row_scale["A"][i].mT
    U, sigma, Vt = torch.linalg.svd((R_B * group.D[i].mT) @ R_A.mT, full_matrices=False)
    inverse = torch.where(sigma > RESOLVED * sigma[:1], sigma, torch.inf).rsqrt()
    P = group.D[i] * (R_A.mT @ (Vt.mT * inverse))
    Q = group.D[i] * (R_B.mT @ (U * inverse))
    return fit_rank(P, rank), fit_rank(Q, rank)


def _subspace_iteration(group: Group, rank: int) -> Pair:
    wide = min(rank + OVERSAMPLING, group.total_rank)
    solver = AlternatingLeastSquares(tolerance=1e-10, max_sweeps=300)
    pair = solver.solve(group, solve_fedavg(group), wide)
    return balance(group, pair, rank)
