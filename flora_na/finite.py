"""Numbers that are none, or too large: found by passes that write nothing, and named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .target import Target

LARGEST_SQUARE = 1e300
"""Of a factor's norm, and of the product of both: sums and products of such squares stay within float64."""


def is_finite(x: Tensor) -> bool:
    """Whether no number of ``x`` is NaN or Inf.

    A sum carries both along: only where it is not finite itself (finite numbers may overflow it) are they looked at
    one by one, which takes ten times as long.
    """
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def check_finite(target: Target) -> None:
    """Raise ValueError naming the first member and factor of the module that holds NaN or Inf, if any does."""
    for member, pair in enumerate(zip(target.B, target.A, strict=True)):
        for name, factor in zip(("lora_B", "lora_A"), pair, strict=True):
            if not is_finite(factor):
                kind = "NaN" if bool(torch.isnan(factor).any()) else "Inf"
                raise ValueError(f"{target.name}: {name} of {target.label(member)} contains {kind}")


def check_traces(targets: Sequence[Target], B: Tensor, A: Tensor) -> None:
    """Raise where the traces of the Grams, which hold every number's square, say that one is NaN, Inf or too large."""
    of_B, of_A = (G.diagonal(dim1=-2, dim2=-1).sum(-1).tolist() for G in (B, A))
    for target, b, a in zip(targets, of_B, of_A, strict=True):
        if not (b < LARGEST_SQUARE and a < LARGEST_SQUARE and b * a < LARGEST_SQUARE):
            check_finite(target)
            raise ValueError(f"{target.name}: {_largest(target)}: squares of such products are beyond float64")


def _largest(target: Target) -> str:
    """Whose pair of factors is the largest, for a message."""
    sizes = [
        [float(f.abs().max()) * float(s) if f.numel() else 0.0 for f, s in zip(factors, scale.abs(), strict=True)]
        for factors, scale in ((target.B, target.scale_B), (target.A, target.scale_A))
    ]
    at = max(range(len(target.B)), key=lambda u: sizes[0][u] * sizes[1][u])
    reached = f"{sizes[0][at]:.1e} in B and {sizes[1][at]:.1e} in A"
    return f"the entries of {target.label(at)}, with its scaling, reach {reached}"
