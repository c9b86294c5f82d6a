"""Small dense algebra, batched and in float64, that never looks at a value: nothing waits for the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .coefficients import inverse_or_zero

SHIFTS = (1e-12, 1e-5)
"""Added to the diagonal of unit-diagonal matrices before Cholesky: what float64 needs to go through, and where it does
not (Grams of the GPU kernels are right to 2e-6), enough for any of those. A shift never makes an estimate wrong: the
pair is another one of the same span, and what it is worth is measured afterwards."""

DEPENDENT = 4.0
"""A pivot this many times the shift or less is mostly shift."""


@functools.lru_cache(maxsize=64)
def layout_of(ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For clients of these ranks: the client of every stacked row (R,), and where it sits: ``membership`` (R, U) and
    ``selector`` (R, max rank), float64 zeros and ones. Made once: a list cannot be sent to a device without waiting.
    """
    member = torch.tensor([u for u, r in enumerate(ranks) for _ in range(r)], dtype=torch.int64, device=device)
    slot = torch.tensor([j for r in ranks for j in range(r)], dtype=torch.int64, device=device)
    clients = torch.arange(len(ranks), device=device)
    columns = torch.arange(max(ranks), device=device)
    return member, (member[:, None] == clients).double(), (slot[:, None] == columns).double()


@functools.lru_cache(maxsize=64)
def positions_of(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of modules as an index on the device, made once."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


def cholesky_inverse_root(S: Tensor, floor: Tensor | None = None) -> Tensor:
    """T (..., r, r) with ``T^T S T`` near the identity on the range of S, zero for columns of norm up to ``floor``.

    Zero too for columns that depend on those before them up to the shift: what is left of such a one is rounding, and
    made as long as the others it would grow from one half-step to the next. The Cholesky counterpart of
    ``coefficients.orthonormaliser``: eigenvalues make the host wait for a GPU.
    """
    norms = S.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    scale = inverse_or_zero(norms if floor is None else torch.where(norms > floor, norms, 0.0))
    unit = S * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    # the diagonal of a column that is left out is zero: with a one there it stays apart from the others
    unit = 0.5 * (unit + unit.mT) * (1 - eye) + eye
    roots, failed = [], None
    for shift in SHIFTS:
        L, info = torch.linalg.cholesky_ex(unit + shift * eye)
        own = L.diagonal(dim1=-2, dim2=-1).square() > DEPENDENT * shift
        roots.append(torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False).mT * own.unsqueeze(-2))
        failed = info if failed is None else failed
    assert failed is not None
    return scale.unsqueeze(-1) * torch.where((failed == 0)[..., None, None], roots[0], roots[1])


def solve_shifted(H: Tensor, g: Tensor) -> Tensor:
    """``H x = g`` for (..., U, U) positive semidefinite H, up to the shift: a step that never raises the objective."""
    T = cholesky_inverse_root(H)
    return (T @ (T.mT @ g.unsqueeze(-1))).squeeze(-1)


def spread_columns(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) fixed numbers in [-1, 1] without pattern: a sketch that needs no generator."""
    n = torch.arange(1, rows * columns + 1, dtype=torch.float64, device=device)
    return torch.cos(n * n * 2.399963229728653).view(rows, columns)
