"""Gradient matching as a gradient loop: SGD on softmax weights (CAGrad and STAMP's code, written from the formula)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMOOTHING = 1e-4


def softmax_weights(G: Tensor, c: float, *, steps: int = 100, lr: float = 25.0, momentum: float = 0.5) -> Tensor:
    """Weights (K,) after ``steps`` steps of SGD on ``<g_w, g0> + c ||g0|| sqrt(||g_w||^2 + 1e-4)``, the best seen.

    G (K, K) is divided by the squared mean norm first; w is the softmax of what is learnt. Where G itself has a graph,
    every step goes back through it.
    """
    scale = (G.diagonal() + SMOOTHING).sqrt().mean()
    G = G / scale.square()
    b = G.mean(1)
    radius = c * (b.mean() + SMOOTHING).sqrt()
    logits = torch.zeros(len(G), dtype=G.dtype, device=G.device, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=lr, momentum=momentum)
    best, best_value = torch.softmax(logits, 0).detach(), torch.inf
    for _ in range(steps):
        optimizer.zero_grad()
        w = torch.softmax(logits, 0)
        value = w @ b + radius * (w @ G @ w + SMOOTHING).sqrt()
        if value.item() < best_value:
            best, best_value = w.detach().clone(), value.item()
        value.backward(retain_graph=G.requires_grad)
        optimizer.step()
    return best


def coefficients(w: Tensor, G: Tensor, c: float) -> Tensor:
    """v of the direction ``sum_k v_k g_k = g0 + (c ||g0|| / ||g_w||) g_w``."""
    u = torch.full_like(w, 1 / len(w))
    radius = c * (u @ G @ u).clamp_min(0).sqrt()
    return u + radius / (w @ G @ w).clamp_min(1e-30).sqrt() * w


def match_stacked(
    lists: Sequence[Sequence[Tensor]], c: float, *, steps: int = 100, graph: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Flatten, stack, Gram, ``steps`` steps, direction cut back into parameters; returns v and the direction.

    With ``graph`` the Gram matrix stays in the graph of the stacked gradients, as it does in the authors' code.
    """
    rows = torch.stack([torch.cat([t.flatten() for t in tensors]) for tensors in lists])
    G = rows.requires_grad_(graph) @ rows.T
    w = softmax_weights(G, c, steps=steps)
    G, rows = G.detach(), rows.detach()
    v = coefficients(w, G, c)
    d = v @ rows
    pieces = d.split([t.numel() for t in lists[0]])
    return v, [x.view_as(t) for x, t in zip(pieces, lists[0], strict=True)]
