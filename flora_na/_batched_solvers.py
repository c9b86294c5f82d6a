"""The iterations of ``flora-na`` and ``als`` with a fixed number of sweeps and a mask of what has converged."""

from __future__ import annotations

import torch
from torch import Tensor

from ._batched_algebra import cholesky_inverse_root, solve_shifted
from ._batched_group import BatchedGroup
from ._scalar_problem import conjugate_gradients, even_norms
from .als import CANCELLED
from .coefficients import inverse_or_zero
from .members import Side

CG_STEPS = 4
"""Steps of conjugate gradients towards a half-step where H is not formed: they start from the last sweep's scalars."""


def _frozen(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return torch.where(done.view(-1, *(1,) * (new.ndim - 1)), old, new)


def scalars(
    group: BatchedGroup, p: Tensor, q: Tensor, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p and q (L, U) by alternating least squares from the averages, the sweeps of each module, and which converged."""
    done = torch.zeros(group.modules, dtype=torch.bool, device=p.device)
    ran = torch.zeros(group.modules, dtype=torch.int64, device=p.device)
    before = torch.zeros(group.modules, dtype=torch.float64, device=p.device)
    for sweep in range(sweeps):
        new_p, _ = _improve(group, "B", p, q)
        new_q, captured = _improve(group, "A", q, new_p)
        p, q, ran = _frozen(done, p, new_p), _frozen(done, q, new_q), ran + ~done
        if sweep:
            left = (group.energy - captured).clamp_min(1e-13 * group.energy)
            done = done | (captured - before <= tolerance * left)
        before = captured
    return *_equal_norms(group, p, q), ran, done


def _improve(group: BatchedGroup, side: Side, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The step in one side's scalars with the other's fixed, and ``<dW, BA>`` after it."""
    other: Side = "A" if side == "B" else "B"
    Y = group.expand(q)
    C = group.apply(other, Y)
    S = Y.mT @ C

    def traces(Z: Tensor) -> Tensor:
        return group.sum_clients((Z * group.selector).sum(-1))

    h = traces(group.apply(side, group.D * C))
    if group.gram is not None:
        tiled = group.selector @ S @ group.selector.mT
        H = group.membership.mT @ ((group.gram[side] * tiled) @ group.membership)
        step = solve_shifted(H, h - (H @ p.unsqueeze(-1)).squeeze(-1))
    else:

        def product(x: Tensor) -> Tensor:
            return traces(group.apply(side, group.expand(x)) @ S)

        flat = group.rounding * S.diagonal(dim1=-2, dim2=-1).sum(-1) * group.norms[side].square().sum(-1)
        step, _ = conjugate_gradients(product, h - product(p), CG_STEPS, flat)
    p = p + step
    return p, (h * p).sum(-1)


def _equal_norms(group: BatchedGroup, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``||B||`` and ``||A||`` within a factor of two."""
    P, Q = group.expand(p), group.expand(q)
    b, a = (P * group.apply("B", P)).sum((-2, -1)), (Q * group.apply("A", Q)).sum((-2, -1))
    ratio = even_norms(b, a).unsqueeze(-1)
    return p * ratio, q / ratio


def alternating(group: BatchedGroup, Q: Tensor, sweeps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P and Q (L, R, r) by alternating least squares from Q, the sweeps of each module, and which converged."""
    done = torch.zeros(group.modules, dtype=torch.bool, device=Q.device)
    ran = torch.zeros(group.modules, dtype=torch.int64, device=Q.device)
    before = torch.zeros(group.modules, dtype=torch.float64, device=Q.device)
    for _ in range(sweeps):
        P, _, _ = _half_step(group, "A", Q)
        new_Q, _, captured = _half_step(group, "B", P)
        Q, ran = _frozen(done, Q, new_Q), ran + ~done
        left = (group.energy - captured).clamp_min(1e-13 * group.energy)
        done = done | (captured - before <= tolerance * left)
        before = captured
    P, Q, _ = _half_step(group, "A", Q)
    lengths = (P * group.apply("B", P)).sum(-2, keepdim=True).clamp_min(0).sqrt()  # the rows of A have length 1
    root = lengths.sqrt()
    return P * inverse_or_zero(root), Q * root, ran, done


def _half_step(group: BatchedGroup, side: Side, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Given Y of one side: the best X of the other, Y with orthonormal columns in its metric, and ``||Y||^2``."""
    C = group.apply(side, Y)
    S = Y.mT @ C
    T = cholesky_inverse_root(S, CANCELLED * (group.norms[side].unsqueeze(-1) * Y.abs()).sum(1))
    return group.D * (C @ T), Y @ T, S.diagonal(dim1=-2, dim2=-1).sum(-1)
