"""Concatenated factors: exact, at the cost of a rank that is the sum of the clients' (FLoRA), and residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .finite import is_finite
from .target import Target


def concatenate(
    target: Target, extra: Sequence[tuple[float, Tensor, Tensor]] = (), dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Factors (m, R), (R, n) whose product is ``dW`` plus ``c B A`` of every ``extra`` (c, B, A).

    Each coefficient is split evenly over its two factors, the sign to B.
    """
    dtype = target.dtype if dtype is None else dtype
    terms = [*zip(target.coefficients.tolist(), target.B, target.A, strict=True), *extra]
    kept = [(c, b, a) for c, b, a in terms if c != 0] or [(0.0, target.B[0][:, :0], target.A[0][:0])]
    B = torch.cat([_scaled(b, abs(c) ** 0.5 * (1 if c > 0 else -1), dtype) for c, b, _ in kept], 1)
    A = torch.cat([_scaled(a, abs(c) ** 0.5, dtype) for c, _, a in kept], 0)
    return B, A


def residual_factors(target: Target, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The residual ``dW - BA`` as factors of rank R + r: 16 bits would add an error.

    In float32, or float64 where that is the clients' or float32 overflows.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    pair = concatenate(target, [(-1.0, B, A)], dtype)
    return pair if all(map(is_finite, pair)) else concatenate(target, [(-1.0, B, A)], torch.float64)


def _scaled(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), dtype)
    return (x.to(wide) * factor).to(dtype)
