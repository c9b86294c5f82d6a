"""Frobenius norm of a weighted sum of low-rank products, never formed: what certifies a relative divergence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._factor_inputs import Factors, check_factors

CORE_SHARE = 4  # R-only QR where 4 R <= min(m, n): there its 2 (m + n) R^2 flops undercut the 2 m n R of the product
STRIP_BYTES = 1 << 21
STRIP_COLUMNS = 512
STRIP_BYTES_GPU = 1 << 28  # there a strip is a dozen launches, however small it is
LEAST_ROWS = 512  # of a block of a QR: less is mostly the call


def lowrank_norm(B: Factors, A: Factors, coefficients: Sequence[Tensor]) -> list[Tensor]:
    """Frobenius norms of ``sum_u c_u B_u A_u``, module by module, in float64 and without cancellation.

    A divergence ``||dW - B A||`` is such a norm, with the estimate as one more client of coefficient -1. Computed from
    Gram matrices it would be a difference of squares, worthless below a relative 1e-8. Here the differences are taken
    between numbers, not between squares: on strips of the sum (2 MiB, on a GPU 256 MiB), or, where the ranks sum to
    little, on the small core ``R_B diag(c) R_A^T`` of the two QR factorisations. Either holds a relative divergence
    down to about 1e-13.
    The work is float64 matrix products and QR, which cuBLAS, LAPACK and BLAS do at the floor on any device: there is no
    Triton variant.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``; any float type.
        A: ``A[l][u]`` (r_lu, n_l).
        coefficients: ``coefficients[l]`` (U_l,) float64, on the factors' device.

    Returns:
        One 0-dim float64 tensor per module, on the inputs' device.

    Raises:
        ValueError: shapes or types do not fit together; the message names the tensor.
    """
    check_factors(B, A)
    if len(coefficients) != len(B):
        raise ValueError(f"coefficients: {len(coefficients)} modules, B has {len(B)}")
    for l, (c, clients) in enumerate(zip(coefficients, B, strict=True)):
        if c.shape != (len(clients),) or c.dtype != torch.float64:
            raise ValueError(f"coefficients[{l}]: expected float64 ({len(clients)},), got {tuple(c.shape)} {c.dtype}")
    return [_norm(bs, as_, c) for bs, as_, c in zip(B, A, coefficients, strict=True)]


@torch.no_grad()
def _norm(B: Sequence[Tensor], A: Sequence[Tensor], c: Tensor) -> Tensor:
    if c.device.type == "cpu" and not torch.compiler.is_compiling():  # comparing waits for a GPU
        B, A, c = _merged(B, A, c)
        A, B, c = _merged(A, B, c)
    m, n, R = B[0].shape[0], A[0].shape[1], sum(b.shape[1] for b in B)
    if not m * n * R:
        return torch.zeros((), dtype=torch.float64, device=c.device)
    rows = [a.T for a in A]
    ones = torch.ones_like(c)
    # a GPU multiplies some hundred times as fast as it factors
    if c.device.type == "cpu" and min(m, n) >= CORE_SHARE * R:
        return torch.linalg.matrix_norm(_triangle(B, c, R) @ _triangle(rows, ones, R).T)
    height, width = _strip(m, n, c.device)
    strip = torch.empty(height * width, dtype=torch.float64, device=c.device)
    norms = []
    for j in range(0, n, width):
        right = _stacked(rows, ones, j, j + width)
        for i in range(0, m, height):
            left = _stacked(B, c, i, i + height)
            part = strip[: left.shape[0] * right.shape[0]].view(left.shape[0], right.shape[0])
            norms.append(torch.linalg.vector_norm(torch.mm(left, right.T, out=part)))
    return torch.linalg.vector_norm(torch.stack(norms))


def _strip(m: int, n: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of the parts of the product that are formed: in the cache of a CPU, few on a GPU."""
    few = launches_cost(device)
    width = min(n, STRIP_BYTES_GPU // 8 if few else STRIP_COLUMNS)
    return min(m, max(1, (STRIP_BYTES_GPU if few else STRIP_BYTES) // (8 * width))), width


def launches_cost(device: torch.device) -> bool:
    """Whether every operation costs a launch, and none is to be kept in a small cache."""
    return device.type == "cuda"


def _merged(
    free: Sequence[Tensor], fixed: Sequence[Tensor], c: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
    """The same sum with one term for all clients that have the first one's ``fixed`` factor (a frozen A, say).

    Their ``free`` factors are added up, so that differences are taken between numbers here too.
    """
    first = fixed[0]
    alike = [u for u, x in enumerate(fixed) if x is first or (x.dtype == first.dtype and torch.equal(x, first))]
    if len(alike) < 2:
        return free, fixed, c
    total = torch.zeros_like(free[0], dtype=torch.float64)
    for u in alike:
        total.add_(free[u].double() * c[u])
    rest = [u for u in range(len(fixed)) if u not in alike]
    one = c.new_ones(1)
    return [total, *(free[u] for u in rest)], [first, *(fixed[u] for u in rest)], torch.cat([one, c[rest]])


def _stacked(columns: Sequence[Tensor], coefficients: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start:stop`` of the clients' tall factors side by side, each times its coefficient, in float64."""
    parts = [t[start:stop] for t in columns]
    if launches_cost(coefficients.device) and len({t.dtype for t in parts}) == 1:  # a few launches, not two a client
        ranks = [t.shape[1] for t in parts]
        spread = torch.cat([w.expand(r) for w, r in zip(coefficients.unbind(), ranks, strict=True)])
        return torch.cat(parts, 1).double().mul_(spread)
    return torch.cat([t.double() * w for t, w in zip(parts, coefficients, strict=True)], 1)


def _triangle(columns: Sequence[Tensor], coefficients: Tensor, width: int) -> Tensor:
    """R of the QR of the stacked columns, in blocks of rows folded together (TSQR): memory for a few triangles."""
    triangle = torch.zeros(0, width, dtype=torch.float64, device=coefficients.device)
    step = max(2 * width, LEAST_ROWS)
    for start in range(0, columns[0].shape[0], step):
        block = _stacked(columns, coefficients, start, start + step)
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    return triangle
