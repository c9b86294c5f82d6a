"""The freedom in a pair: ``(B R, R^-1 A)`` is the same update (MATH.md 1.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgram import kernels

from .coefficients import Pair
from .group import Group


def align(group: Group, pair: Pair, previous: Sequence[tuple[Tensor, Tensor]], backend: str = "auto") -> Pair:
    """Rotate every module's pair to come nearest to the previous factors ``(B_prev (m, k), A_prev (k, n))``, k <= r.

    The orthogonal R that minimises ``||BR - B_prev||^2 + ||R^T A - A_prev||^2`` is the polar factor of
    ``B^T B_prev + A A_prev^T`` (Procrustes), whose r x k entries come from one projection of the clients' factors.

    Raises:
        ValueError: a previous factor does not fit the module, or has a higher rank than the result.
    """
    rank = pair.P.shape[-1]
    for target, (B, A) in zip(group.targets, previous, strict=True):
        if B.shape[0] != target.B[0].shape[0] or A.shape[1] != target.A[0].shape[1] or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"align_to: {target.name}: B {tuple(B.shape)} and A {tuple(A.shape)} do not fit the module"
            )
        if B.shape[1] > rank:
            raise ValueError(f"align_to: {target.name}: rank {B.shape[1]} is above the result's rank {rank}")
    B = [b.to(t.dtype) for t, (b, _) in zip(group.targets, previous, strict=True)]
    A = [a.to(t.dtype) for t, (_, a) in zip(group.targets, previous, strict=True)]
    X_B, X_A = kernels.factor_cross([t.B for t in group.targets], [t.A for t in group.targets], B, A, backend=backend)
    Y_B, Y_A = (group.row_scale[side] * _stack(X, rank).to(group.device) for side, X in (("B", X_B), ("A", X_A)))
    M = pair.P.mT @ Y_B + pair.Q.mT @ Y_A
    U, _, Vt = torch.linalg.svd(M)
    R = U @ Vt
    return Pair(pair.P @ R, pair.Q @ R, pair.status, pair.sweeps)


def _stack(X: list[Tensor] | None, rank: int) -> Tensor:
    """Projections (R, k) of all modules as one (L, R, rank) tensor, zero-padded."""
    return torch.stack([torch.nn.functional.pad(x, (0, rank - x.shape[-1])) for x in X or []])
