"""The best rank-r pair (Eckart-Young), and the error against rank, from R x R matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedgram import kernels

from ._block_solver import MOST_COLUMNS, certified_blocks
from ._spectrum_solver import CompiledSpectrum, compiled_spectrum
from .als import CANCELLED, IMPLICIT_FLOOR, AlternatingLeastSquares
from .coefficients import Pair, balanced_coefficients, eigh_psd, fit_rank, inverse_or_zero
from .energies import MARGIN, ROUNDING, energies, mass_of_target, rounding
from .group import Group
from .krylov import solve_krylov

SPECTRUM_RANK = 512
EXCESS = 1e-6
"""A pair whose squared error is this part above the optimum's has other rows than the best, beside their rounding."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of dW from small matrices, with what maps them back to factors.

    With ``G_A = L L^T``, the squared singular values of ``dW = Bs D As`` are the eigenvalues of ``L^T D G_B D L``.

    Attributes:
        squares: (L, R) squared singular values, descending, float64.
        vectors: (L, R, R) eigenvectors, in the same order.
        L: (L, R, R) the square root of G_A.
    """

    squares: Tensor
    vectors: Tensor
    L: Tensor


def spectrum(group: Group) -> Spectrum:
    """The spectrum of every module's dW; needs the formed Grams."""
    M, L = _core(group)
    squares, vectors = eigh_psd(M)
    return Spectrum(squares.flip(-1), vectors.flip(-1), L)


def squared_singular_values(group: Group) -> Tensor:
    """(L, R) float64 of every module's dW, descending; less work than ``spectrum``."""
    if group.memo.singular_squares is None:
        found = compiled_spectrum(group, group.total_rank)
        values = _general_spectrum(group) if found is None else found.values
        if found is not None and found.left:
            values[found.left] = _general_spectrum(group.subset(found.left))
        group.memo.singular_squares = values
    return group.memo.singular_squares


def optimum_error(group: Group, rank: int) -> Tensor:
    """(L,) ``||dW - BA||^2`` of the best pair of ``rank``, to the rounding of the Grams; see ``unresolved``."""
    found = None
    if group.memo.singular_squares is None:
        found = group.memo.best_rows.get(rank) or compiled_spectrum(group, rank)
    if found is None:
        return squared_singular_values(group)[:, rank:].sum(-1)
    tail = found.tail.clone()
    if found.left:
        tail[found.left] = _general_spectrum(group.subset(found.left))[:, rank:].sum(-1)
    return tail


def _general_spectrum(group: Group) -> Tensor:
    M, _ = _core(group)
    return torch.linalg.eigvalsh(0.5 * (M + M.mT)).clamp_min(0.0).flip(-1)


def _core(group: Group) -> tuple[Tensor, Tensor]:
    """``L^T D G_B D L``, whose eigenvalues are dW's squared singular values, and L."""
    assert group.gram is not None
    L = square_root(group.gram["A"])
    DL = group.D * L
    return DL.mT @ (group.gram["B"] @ DL), L


def square_root(G: Tensor) -> Tensor:
    """L with ``L L^T = G``: Cholesky where it exists, else from the eigenvectors.

    On the unit-diagonal matrix: how a client's update is split over its two factors (``cB, A / c``) leaves no trace.
    """
    norms = G.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    inverse = inverse_or_zero(norms)
    unit = G * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    L, info = torch.linalg.cholesky_ex(unit)
    failed = info != 0
    if bool(failed.any()):
        values, vectors = eigh_psd(unit[failed])
        L[failed] = vectors * values.sqrt().unsqueeze(-2)
    return norms.unsqueeze(-1) * L


def solve_svd(group: Group, rank: int) -> Pair:
    """The best pair of rank ``rank``, balanced; trailing columns are zero where dW has lower rank.

    Modules whose remaining error is too small for their Grams to resolve, or whose pair loses what they do resolve, are
    solved again from QR factors, which resolve singular values down to 1e-16 of the largest. Without Grams, or where
    their decomposition would cost more than it, the pair comes from a block Krylov space.
    """
    if by_krylov(group):
        return settle(group, solve_krylov(group, rank))
    return certified_optimum(group, rank) or _general_optimum(group, rank)


def doubtful_optima(group: Group, rank: int) -> list[int]:
    """The modules whose optimum of this rank the compiled solvers leave to the general path."""
    if by_krylov(group) or (found := _best_rows(group, rank)) is None:
        return []
    return sorted({*found.left, *unresolved(group, found.tail).nonzero().flatten().tolist()})


def _best_rows(group: Group, rank: int) -> CompiledSpectrum | None:
    """The compiled spectrum with its rows, or None."""
    if not 0 < rank <= min(group.total_rank, MOST_COLUMNS):
        return None
    if rank not in group.memo.best_rows:
        group.memo.best_rows[rank] = compiled_spectrum(group, rank, rank)
    return group.memo.best_rows[rank]


def certified_optimum(group: Group, rank: int) -> Pair | None:
    """From the compiled solvers; None where they leave a module in doubt.

    A sweep normalises and polishes the rows. That they are the right ones shows: the error of the pair is what the
    other singular values add up to.
    """
    found = _best_rows(group, rank)
    if found is None or found.left or bool(unresolved(group, found.tail).any()):
        return None
    pair = certified_blocks(group, found.rows, tolerance=0.0, max_sweeps=1, cancelled=CANCELLED)
    if pair is None or pair.evidence is None:
        return None
    if bool((pair.evidence.error > (1 + EXCESS) * found.tail + 16 * rounding(group) * group.mass**2).any()):
        return None
    return Pair(pair.P, pair.Q, "closed-form", evidence=pair.evidence)  # the sweep is no iteration


def _general_optimum(group: Group, rank: int) -> Pair:
    assert group.gram is not None
    s = spectrum(group)
    group.memo.singular_squares = s.squares
    V = group.D * (s.L @ s.vectors[..., :rank])
    # A = V^T dW^T dW spans the right singular vectors without a division; one sweep normalises and polishes it
    Q = group.D * (group.gram["B"] @ V)
    if Q.numel():  # so that its squares stay within float64's range
        Q = Q * inverse_or_zero(Q.abs().amax((-2, -1), keepdim=True))
    pair = AlternatingLeastSquares(max_sweeps=1).solve(group, Pair(Q, Q, ""), V.shape[-1])
    P, Q = fit_rank(pair.P, rank), fit_rank(pair.Q, rank)
    best, tail = s.squares[:, :rank].sum(-1), s.squares[:, rank:].sum(-1)
    del s  # what follows may be another decomposition
    captured = (P * group.apply("B", P)).sum(-2).square().sum(-1)  # of a balanced pair
    short = best - captured > EXCESS * tail + 4 * rounding(group) * group.mass**2
    again = (unresolved(group, tail) | short).nonzero().flatten().tolist()
    for i in again:
        P[i], Q[i] = _from_triangles(group, i, rank)
    known = None if again else pair.evidence
    return Pair(P, Q, "closed-form", evidence=known)


def by_krylov(group: Group) -> bool:
    """Whether the optimum comes from a Krylov space: R x R decompositions cost some ``R^3`` and memory to match."""
    return group.gram is None or group.total_rank > SPECTRUM_RANK


def unresolved(group: Group, error: Tensor) -> Tensor:
    """(L,) where the squared error of the optimum is not safely above the rounding of the Grams."""
    return error < MARGIN * rounding(group) * group.mass**2


def settle(group: Group, pair: Pair) -> Pair:
    """A balanced pair of an iteration, with the modules solved again from QR factors whose error it cannot resolve.

    The limit of the iteration is the optimum, which is what QR factors give directly. A pair with evidence is resolved.
    """
    if pair.evidence is not None:
        return pair
    rank = pair.P.shape[-1]
    P, Q = pair.P.clone(), pair.Q.clone()
    captured = (P * group.apply("B", P)).sum(-2).square().sum(-1)  # of a balanced pair, B^T B = A A^T
    for i in blurred(group, energies(group) - captured).nonzero().flatten().tolist():
        P[i], Q[i] = _from_triangles(group, i, rank)
    return Pair(P, Q, pair.status, pair.sweeps, ended=pair.ended)


def blurred(group: Group, error: Tensor, mass: Tensor | float = 0.0) -> Tensor:
    """(L,) where a squared error that an iteration in float64 left is lost in rounding, unless the dtype loses more.

    ``mass`` (L,) is what cancels within the pair itself, beside what cancels within dW.
    """
    energy, lost = energies(group), ROUNDING["float64"] * (mass_of_target(group) + mass) ** 2
    if group.gram is None:
        lost = torch.maximum(lost, IMPLICIT_FLOOR / MARGIN * energy)
    own = max(torch.finfo(t.dtype).eps for t in group.targets) ** 2
    return (energy > 0) & ~(error >= MARGIN * lost) & ~(lost <= own * energy)


def _from_triangles(group: Group, i: int, rank: int) -> tuple[Tensor, Tensor]:
    """Coefficients (R, rank) of module ``i`` from the SVD of ``R_B D R_A^T``, whose entries are not squared."""
    R_B, R_A = _triangles(group, i)
    P, Q = balanced_coefficients(R_B * group.D[i].mT, R_A)
    return fit_rank(group.D[i] * P, rank), fit_rank(Q, rank)


def core_values(group: Group, i: int) -> Tensor:
    """The singular values of module ``i``, as many as its dW can have, from ``R_B D R_A^T``: nothing is squared."""
    R_B, R_A = _triangles(group, i)
    return torch.linalg.svdvals((R_B * group.D[i].mT) @ R_A.mT)


def _triangles(group: Group, i: int) -> tuple[Tensor, Tensor]:
    """R_B (k, R) and R_A (l, R) of the QR of module ``i``'s stacked factors, with their scalings."""
    target = group.targets[i]
    [R_B], [R_A] = kernels.factor_triangle([target.B], [target.A])
    R_B, R_A = R_B.to(group.device), R_A.to(group.device)
    return R_B * group.row_scale["B"][i].mT, R_A * group.row_scale["A"][i].mT
