"""What is right: float64 references, written densely and apart from the package's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# What factor_gram and grad_gram promise relative to ||G||: of 16-bit inputs, and of float32 without precise=True.
GRAM = 2e-6


def dense_update(B: Sequence[Tensor], A: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``sum_u w_u B_u A_u`` (m, n) in float64."""
    left = torch.cat([b.double() * w for b, w in zip(B, weights.tolist(), strict=True)], 1)
    return left @ torch.cat([a.double() for a in A], 0)


def worst(errors: Iterable[float]) -> float:
    """The largest of some errors, 0 of none; NaN where one is not finite, which Python's ``max`` may pass over."""
    found = list(errors)
    return max(found, default=0.0) if all(map(math.isfinite, found)) else math.nan


def relative_error(result: Tensor, truth: Tensor) -> float:
    """``||result - truth|| / ||truth||`` in float64; Inf where the shapes differ, or only the truth is zero."""
    if result.shape != truth.shape:
        return math.inf
    error = float((result.double() - truth.double()).norm())
    size = float(truth.double().norm())
    return error / size if size else math.inf if error else 0.0


def list_error(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """The largest relative error over a list of tensors; NaN where one is not finite or the shapes differ."""
    return worst(relative_error(r, t) for r, t in zip(results, truths, strict=True))


def rho(pair: tuple[Tensor, Tensor], update: Tensor) -> float:
    """``||dW - BA|| / ||dW||`` in float64."""
    B, A = pair
    return relative_error(B.double() @ A.double(), update)


def optimal_rho(B: Sequence[Tensor], A: Sequence[Tensor], weights: Tensor, rank: int) -> float:
    """rho of the best pair of this rank: the tail of dW's singular values, from those of its QR core."""
    left = torch.cat([b.double() * w for b, w in zip(B, weights.tolist(), strict=True)], 1)
    right = torch.cat([a.double() for a in A], 0)
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    s = torch.linalg.svdvals(core)
    return float(s[rank:].norm() / s.norm())


def scalar_rho(B: Sequence[Tensor], A: Sequence[Tensor], weights: Tensor, sweeps: int = 500) -> float:
    """rho that scalar coefficients reach: dense least squares for p and q in turns, from the averaged factors."""
    dW = dense_update(B, A, weights)
    Bs, As = torch.stack([b.double() for b in B]), torch.stack([a.double() for a in A])
    q, best = weights.to(dW), math.inf
    for _ in range(sweeps):
        products = Bs @ torch.tensordot(q, As, 1)
        p = _least_squares(products, dW)
        products = torch.tensordot(p, Bs, 1) @ As
        q = _least_squares(products, dW)
        before, best = best, float((dW - torch.tensordot(q, products, 1)).norm() / dW.norm())
        if before - best < 1e-12:
            break
    return best


def _least_squares(products: Tensor, dW: Tensor) -> Tensor:
    basis = products.flatten(1)
    G, h = (basis @ basis.T).cpu(), (basis @ dW.flatten()).cpu()  # gelsd, which takes singular matrices, is LAPACK's
    return torch.linalg.lstsq(G, h, driver="gelsd").solution.to(dW.device)


def gram_of(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """(K, K) inner products of K lists of tensors in float64, tensor by tensor."""
    total = torch.zeros(len(lists), len(lists), dtype=torch.float64, device=lists[0][0].device)
    for tensors in zip(*lists, strict=True):
        for part in zip(*(t.flatten().split(1 << 20) for t in tensors), strict=True):
            rows = torch.stack([x.double() for x in part])
            total += rows @ rows.T
    return total


def matching_excess(coefficients: Tensor, G: Tensor, upper: float, c: float) -> float:
    """How far the worst-off task of direction ``sum_k v_k g_k`` falls below the optimum, relative to the optimum.

    ``upper`` bounds the optimum from above: the dual objective of any point of the simplex. Near a stationary point,
    where it vanishes, a millionth of ``||g0|| sqrt(mean_k G_kk)`` takes its place. The direction is first brought back
    into the ball ``||d - g0|| <= c ||g0||`` where it lies outside.
    """
    v = coefficients.double().cpu()
    K = len(v)
    u = torch.full((K,), 1 / K, dtype=torch.float64)
    radius, step = c * (u @ G @ u).clamp_min(0).sqrt(), ((v - u) @ G @ (v - u)).clamp_min(0).sqrt()
    if step > radius:
        v = u + (v - u) * (radius / step)
    scale = (u @ G @ u).sqrt() * G.diagonal().mean().sqrt()
    return float((upper - (G @ v).min()) / max(upper, 1e-6 * float(scale)))


def dual_objective(weights: Tensor, G: Tensor, c: float) -> float:
    """``<g_w, g0> + c ||g0|| ||g_w||`` of weights put back on the simplex: a bound on every direction's worth."""
    w = weights.double().cpu().clamp_min(0)
    w = w / w.sum()
    u = torch.full((len(w),), 1 / len(w), dtype=torch.float64)
    return float(w @ G @ u + c * (u @ G @ u).sqrt() * (w @ G @ w).clamp_min(0).sqrt())
