"""A combination whose coefficients are known beforehand, and the Gram matrices, from one read of the factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import resolve
from ._factor_inputs import Factors, Pairs
from ._native_factors import combine_with_grams
from ._prepared import first
from .factor_combine import Combination, factor_combine, native_sides, written
from .factor_gram import factor_gram


def gram_combine(
    B: Factors,
    A: Factors,
    P: Sequence[Tensor],
    Q: Sequence[Tensor],
    *,
    beside: bool = False,
    dtype: torch.dtype | None = None,
    precise: bool = False,
    backend: str = "auto",
) -> tuple[Pairs, Pairs]:
    """``factor_combine`` and ``factor_gram``: the average of FedIT with all that its divergence takes, say.

    Args:
        B, A, P, Q, dtype, backend: as in ``factor_combine``; no side is skipped.
        beside: the pair, as rounded, counts as one more client of every module, the last: its products with the
            clients' factors, and its own, are in the Gram matrices too.
        precise: as in ``factor_gram``.

    Returns:
        The pair, lists of (m_l, r) and (r, n_l); and the Gram matrices, two lists of (R_l, R_l), or (R_l + r, R_l + r),
        float64. On the CPU from one read of the factors, on GPUs from two.

    Raises:
        ValueError, RuntimeError: as ``factor_combine``.
    """
    if not torch.compiler.is_compiling() and resolve(backend, first(B, A), native=True) == "native":
        sides = native_sides(Combination(B, A, P, Q, dtype))
        G_B, G_A = combine_with_grams(sides, beside=beside)
        B_out, A_out = written(sides)
        return (B_out, A_out), (G_B, G_A)
    left, right = factor_combine(B, A, P, Q, dtype=dtype, backend=backend)
    assert left is not None
    assert right is not None
    if beside:
        B = [(*bs, b) for bs, b in zip(B, left, strict=True)]
        A = [(*as_, a) for as_, a in zip(A, right, strict=True)]
    return (left, right), factor_gram(B, A, precise=precise, backend=backend)
