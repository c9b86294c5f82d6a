"""Triangular factors of the clients' stacked LoRA factors: square roots of their Grams without squaring."""

from __future__ import annotations

import torch
from torch import Tensor

from ._factor_inputs import Factors, TallColumns, check_factors, tall_A, tall_B


def factor_triangle(B: Factors, A: Factors) -> tuple[list[Tensor], list[Tensor]]:
    """``R_B`` and ``R_A`` with ``R_B^T R_B = Bs^T Bs`` and ``R_A^T R_A = As As^T``, module by module, from QR.

    A Gram in float64 resolves directions down to 1e-8 of the largest; its square root by QR resolves them down to
    1e-16. The factors are read once, in row blocks whose triangles are folded together (TSQR). QR is LAPACK's and
    cuSOLVER's trade: there is no Triton variant.

    Args:
        B: ``B[l][u]`` (m_l, r_lu) of module ``l`` and client ``u``; any float type.
        A: ``A[l][u]`` (r_lu, n_l).

    Returns:
        Two lists of float64 matrices (min(m_l, R_l), R_l) and (min(n_l, R_l), R_l) on the inputs' device.

    Raises:
        ValueError: shapes or types do not fit together; the message names the tensor.
    """
    check_factors(B, A)
    return [_triangle(tall_B(bs)) for bs in B], [_triangle(tall_A(as_)) for as_ in A]


@torch.no_grad()
def _triangle(stack: TallColumns) -> Tensor:
    triangle = torch.zeros(0, stack.width, dtype=torch.float64, device=stack.device)
    for _, _, block in stack.blocks():
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    return triangle
