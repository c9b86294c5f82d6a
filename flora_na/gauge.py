"""The freedom in a pair: ``(B R, R^-1 A)`` is the same update (docs/math.md 1.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgram import kernels
from fedgram.kernels import FLOATS

from .coefficients import AnyPair, Pair
from .finite import is_finite
from .group import Group
from .target import DTYPES_NAMED, Target


def align(group: Group, pair: AnyPair, previous: Sequence[tuple[Tensor, Tensor]], backend: str = "auto") -> Pair:
    """Rotate every module's pair to come nearest to the previous factors ``(B_prev (m, k), A_prev (k, n))``, k <= r.

    The orthogonal R that minimises ``||BR - B_prev||^2 + ||R^T A - A_prev||^2`` is the polar factor of
    ``B^T B_prev + A A_prev^T`` (Procrustes), whose r x k entries come from one projection of the clients' factors.

    Raises:
        ValueError: a previous factor does not fit the module, is not floating point, holds NaN or Inf, or has a higher
            rank than the result.
    """
    rank = pair.P.shape[-1]
    for target, (b, a) in zip(group.targets, previous, strict=True):
        _check(target, b, a, rank)
    previous = [_sized(b, a) for b, a in previous]
    wide = [torch.promote_types(t.dtype, torch.float32) for t in group.targets]
    to_B = [b.to(dtype) for dtype, (b, _) in zip(wide, previous, strict=True)]
    to_A = [a.to(dtype) for dtype, (_, a) in zip(wide, previous, strict=True)]
    B, A = [t.B for t in group.targets], [t.A for t in group.targets]
    X_B, X_A = kernels.factor_cross(B, A, to_B, to_A, backend=backend)
    Y_B = group.row_scale["B"] * _stack(X_B, rank).to(group.device)
    Y_A = group.row_scale["A"] * _stack(X_A, rank).to(group.device)
    M = pair.P.mT @ Y_B + pair.Q.mT @ Y_A
    U, _, Vt = torch.linalg.svd(M)
    R = U @ Vt
    return Pair(pair.P @ R, pair.Q @ R, pair.status, pair.sweeps, ended=pair.ended)


def _check(target: Target, B: Tensor, A: Tensor, rank: int) -> None:
    """Raise ValueError unless the result's pair of ``rank`` can be rotated towards B and A."""
    m, n = target.B[0].shape[0], target.A[0].shape[1]
    if not (B.ndim == A.ndim == 2 and B.shape == (m, A.shape[0]) and A.shape[1] == n):
        raise ValueError(f"align_to: {target.name}: B {tuple(B.shape)} and A {tuple(A.shape)} do not fit the module")
    if B.shape[1] > rank:
        raise ValueError(f"align_to: {target.name}: rank {B.shape[1]} is above the result's rank {rank}")
    for name, factor in (("lora_B", B), ("lora_A", A)):
        if factor.dtype not in FLOATS:
            raise ValueError(f"align_to: {target.name}: {name} is {factor.dtype}: expected {DTYPES_NAMED}")
        if factor.layout != torch.strided or factor.device != target.device:
            where = f"{factor.layout} on {factor.device}"
            raise ValueError(f"align_to: {target.name}: {name} is {where}: expected dense ones on {target.device}")
        if not is_finite(factor):
            raise ValueError(f"align_to: {target.name}: {name} contains NaN or Inf")


def _sized(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Both by one number, which the rotation does not depend on, so that float64 factors fit float32."""
    if torch.float64 not in (B.dtype, A.dtype):
        return B, A
    largest = max((float(x.abs().max()) for x in (B, A) if x.numel()), default=0.0)
    return (B / largest, A / largest) if largest > 0 else (B, A)


def _stack(X: list[Tensor] | None, rank: int) -> Tensor:
    """Projections (R, k) of all modules as one (L, R, rank) tensor, zero-padded."""
    return torch.stack([torch.nn.functional.pad(x, (0, rank - x.shape[-1])) for x in X or []])
