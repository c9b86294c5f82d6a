"""Newton's step for FLoRA-NA's scalars, batched over modules: where alternating steps alone crawl along a valley."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import SAFE_PIVOT

DAMPING = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts by which the curvature that p takes away may be lessened, until what is left is convex."""


def newton_step(H_p: Tensor, C: Tensor, H_q: Tensor, g: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """The step in q towards the least error as a function of q alone, p following at its best.

    Its second derivative is ``K = H_q - W`` with ``W = C^T H_p^-1 C``. Where that is not convex, less of W is taken;
    with none, the step would be the exact one for the present p.

    Args:
        H_p, H_q: (L, n, n) float64, the normal matrices of p and q.
        C: (L, n, n) half the second derivatives by p_i (rows) and q_v.
        g: (L, n) half the negative gradient in q, where p is at its best.
        q: (L, n) the coefficients; None where they have no gauge. ``(c p, q / c)`` is the same product: K has nothing
            along q, and H_q's part there takes that freedom away.

    Returns:
        (L, n) steps, and (L,) the drop of the squared error that each promises: Inf where W was lessened, -1 where
        there is no step.
    """
    L_p, scale_p, safe = _factor(H_p)
    half = torch.linalg.solve_triangular(L_p, scale_p.unsqueeze(-1) * C, upper=False)
    less = torch.tensor(DAMPING, dtype=C.dtype, device=C.device).view(-1, 1, 1, 1)
    K = H_q - (1 - less) * (half.mT @ half)
    if q is not None:
        along = (H_q @ q.unsqueeze(-1)).squeeze(-1)
        K = K + along.unsqueeze(-1) * along.unsqueeze(-2) / (q * along).sum(-1)[:, None, None]
    L_K, scale_K, convex = _factor(K)
    convex = convex & safe
    chosen, modules = convex.int().argmax(0), torch.arange(len(g), device=g.device)
    L, scale = L_K[chosen, modules], scale_K[chosen, modules]
    step = torch.cholesky_solve((g * scale).unsqueeze(-1), L).squeeze(-1) * scale
    promised = torch.where(chosen == 0, (g * step).sum(-1), torch.inf)
    return step, torch.where(convex.any(0), promised, -1.0)


def _factor(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors of (..., n, n) scaled to unit diagonal, the scales, and where no pivot is near rounding."""
    scale = H.diagonal(dim1=-2, dim2=-1).rsqrt()
    L, info = torch.linalg.cholesky_ex(H * (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    safe = (info == 0) & (L.diagonal(dim1=-2, dim2=-1) > SAFE_PIVOT).all(-1)
    return torch.where(safe[..., None, None], L, torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)), scale, safe
