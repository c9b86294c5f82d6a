"""The best rank-r pair (Eckart-Young), and the error against rank, from R x R matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .als import AlternatingLeastSquares
from .coefficients import Pair, balance, eigh_psd, fit_rank
from .fedavg import solve_fedavg
from .group import Group

OVERSAMPLING = 8


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

    In the implicit regime it is subspace iteration with oversampling, run to a tight tolerance.
    """
    if group.gram is None:
        return _subspace_iteration(group, rank)
    s = spectrum(group)
    sigma = s.energies[:, :rank].sqrt()
    floor = 1e-7 * sigma[:, :1]
    inverse = torch.where((sigma > floor) & (sigma > 0), sigma, torch.inf).reciprocal().unsqueeze(-2)
    V = group.D * (s.L @ s.vectors[..., :rank])
    P = V * inverse.sqrt()
    Q = group.D * (group.gram["B"] @ V) * inverse**1.5
    polished = AlternatingLeastSquares(max_sweeps=1).solve(group, Pair(P, Q, "closed-form"), P.shape[-1])
    return Pair(fit_rank(polished.P, rank), fit_rank(polished.Q, rank), "closed-form")


def _subspace_iteration(group: Group, rank: int) -> Pair:
    wide = min(rank + OVERSAMPLING, group.total_rank)
    solver = AlternatingLeastSquares(tolerance=1e-10, max_sweeps=300)
    pair = solver.solve(group, solve_fedavg(group), wide)
    return balance(group, pair, rank)
