"""The dual of gradient matching as a cone program: cvxpy with Clarabel, and TorchJD's CAGrad that rests on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .optional import need

CVXPY = "cvxpy + Clarabel"
TORCHJD = "TorchJD CAGradWeighting"


def cvxpy_solver(c: float) -> Callable[[Tensor], Tensor]:
    """Return ``solve(G) -> v``: minimise ``b^T w + s ||L^T w||`` over the simplex, ``G = L L^T``."""
    (cp, _) = need(CVXPY, "cvxpy", "clarabel")

    def solve(G: Tensor) -> Tensor:
        g = G.double().numpy()
        values, vectors = np.linalg.eigh(g)
        root = vectors * np.sqrt(np.clip(values, 0, None))
        b = g.mean(1)
        s = c * np.sqrt(max(b.mean(), 0.0))
        w = cp.Variable(len(g))
        problem = cp.Problem(cp.Minimize(b @ w + s * cp.norm(root.T @ w, 2)), [w >= 0, cp.sum(w) == 1])
        problem.solve(solver=cp.CLARABEL)
        found = np.asarray(w.value)
        return torch.from_numpy(1 / len(g) + s / np.linalg.norm(root.T @ found) * found)

    return solve


def torchjd_cagrad(c: float) -> Callable[[Tensor], Tensor]:
    """Return ``solve(G) -> v`` as TorchJD's users call it; float64, and without its rounding of small norms to zero."""
    (aggregation, _, _) = need(TORCHJD, "torchjd.aggregation", "cvxpy", "clarabel")
    return aggregation.CAGradWeighting(c=c, norm_eps=0.0)
