"""A pair combined from the clients' factors, and what its divergence takes: its products with them and its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import resolve
from ._factor_inputs import Factors, Pairs
from ._native_factors import combine_with_products
from ._prepared import first
from .factor_combine import Combination, factor_combine, native_sides, written
from .factor_cross import factor_cross


def combine_products(
    B: Factors,
    A: Factors,
    P: Sequence[Tensor],
    Q: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    precise: bool = False,
    backend: str = "auto",
) -> tuple[Pairs, Pairs]:
    """``factor_combine``, and ``factor_cross`` of the clients' factors and the pair with the pair as it was rounded.

    With ``B' = [B_1 .. B_U, B]`` (m, R + r) and ``A' = [A_1; ..; A_U; A]`` (R + r, n), the products ``B'^T B`` and
    ``A' A^T`` give ``<dW, BA>`` and ``||BA||``, hence the divergence of what is returned, its rounding included.

    Args:
        B, A, P, Q, dtype, backend: as in ``factor_combine``; no side is skipped.
        precise: as in ``factor_cross``.

    Returns:
        The pair, lists of (m_l, r) and (r, n_l); and the products, two lists of (R_l + r, r) float64 with the errors of
        ``factor_cross``. On the CPU one read of the factors, on GPUs two.

    Raises:
        ValueError, RuntimeError: as ``factor_combine``.
    """
    if not torch.compiler.is_compiling() and resolve(backend, first(B, A), native=True) == "native":
        return _native(B, A, P, Q, dtype)
    left, right = factor_combine(B, A, P, Q, dtype=dtype, backend=backend)
    assert left is not None
    assert right is not None
    # the pair goes along as one more client: its own Grams come out below its products with the factors
    beside_B = [(*bs, b) for bs, b in zip(B, left, strict=True)]
    beside_A = [(*as_, a) for as_, a in zip(A, right, strict=True)]
    X_B, X_A = factor_cross(beside_B, beside_A, left, right, precise=precise, backend=backend)
    assert X_B is not None
    assert X_A is not None
    return (left, right), (X_B, X_A)


def _native(
    B: Factors, A: Factors, P: Sequence[Tensor], Q: Sequence[Tensor], dtype: torch.dtype | None
) -> tuple[Pairs, Pairs]:
    sides = native_sides(Combination(B, A, P, Q, dtype))
    X_B, X_A = combine_with_products(sides)
    left, right = written(sides)
    return (left, right), (X_B, X_A)
