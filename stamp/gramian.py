"""The Gram matrix of K gradients, held centred at their weighted mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WeightsLike = Sequence[float] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Gramian:
    """Inner products of K gradients ``g_k = g0 + e_k`` around a common vector ``g0``, in float64.

    ``<g_k, g_l> = n0 + h_k + h_l + H_kl``. Gradients of neighbouring tasks share a large part; the dense matrix drowns
    their differences in it, the three parts do not. Leading batch dimensions are allowed on all three alike.

    Attributes:
        n0: ``||g0||^2``, shape ().
        h: ``<g0, e_k>``, shape (K,).
        H: ``<e_k, e_l>``, shape (K, K), symmetric.
        weights: the weights, summing to 1, whose mean ``g0`` is, shape (K,); None stands for uniform weights.
    """

    n0: Tensor
    h: Tensor
    H: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("n0", "h", "H"):
            value = as_tensor(getattr(self, name)).detach().to(torch.float64)
            object.__setattr__(self, name, value)
        K = self.h.shape[-1] if self.h.ndim else 0
        if self.H.shape != (*self.h.shape, K) or self.n0.shape != self.h.shape[:-1]:
            shapes = f"n0 {tuple(self.n0.shape)}, h {tuple(self.h.shape)}, H {tuple(self.H.shape)}"
            raise ValueError(f"gramian: {shapes} do not belong together: expected (), (K,), (K, K)")
        if self.weights is not None and tuple(self.weights.shape) not in ((K,), tuple(self.h.shape)):
            raise ValueError(f"gramian: weights {tuple(self.weights.shape)} do not belong to {K} gradients")

    @property
    def K(self) -> int:
        """The number of gradients."""
        return self.h.shape[-1]

    def dense(self) -> Tensor:
        """The plain Gram matrix ``G_kl = <g_k, g_l>``, shape (K, K), float64."""
        return self.n0[..., None, None] + self.h[..., :, None] + self.h[..., None, :] + self.H

    def cpu(self) -> Gramian:
        """The same on the CPU; from a GPU in one transfer, which waits for it."""
        flat = torch.cat([part.reshape(-1) for part in (self.n0, self.h, self.H)]).cpu()
        sizes = (self.n0.numel(), self.h.numel(), self.H.numel())
        parts = [x.view(part.shape) for x, part in zip(flat.split(sizes), (self.n0, self.h, self.H), strict=True)]
        return Gramian(*parts, None if self.weights is None else self.weights.cpu())

    @classmethod
    def from_dense(cls, G: Tensor | np.ndarray, weights: WeightsLike | None = None) -> Gramian:
        """Centre a plain Gram matrix, shape (K, K), at the mean under ``weights`` (default uniform)."""
        G = as_tensor(G).detach().to(torch.float64)
        if G.ndim < 2 or G.shape[-1] != G.shape[-2] or not G.shape[-1]:
            raise ValueError(f"gramian: expected (K, K) with K at least 1, got {tuple(G.shape)}")
        u = torch.from_numpy(normalised_weights(weights, G.shape[-1])).to(G.device)
        b = G @ u
        n0 = b @ u
        H = G - b[..., :, None] - b[..., None, :] + n0[..., None, None]
        return cls(n0, b - n0[..., None], H, u)


def as_tensor(numbers: Any) -> Tensor:
    """A tensor as it is, on its own device whatever the default one is; anything else as ``torch.as_tensor`` has it."""
    return numbers if isinstance(numbers, Tensor) else torch.as_tensor(numbers)


def normalised_weights(weights: WeightsLike | None, K: int, argument: str = "weights") -> np.ndarray:
    """Return ``weights`` divided by their sum as float64 of shape (K,), or uniform weights for None.

    Raises:
        ValueError: not K numbers, a negative or non-finite one, or a sum of zero.
    """
    if K == 0:
        raise ValueError("gradients: none given; at least one is needed")
    if weights is None:
        return np.full(K, 1.0 / K)
    if isinstance(weights, Tensor):
        weights = weights.detach().cpu().to(torch.float64).numpy()  # numpy has no bfloat16
    try:
        w = np.array(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: expected {K} numbers ({error})") from None
    if w.shape != (K,):
        raise ValueError(f"{argument}: expected {K} numbers, one per gradient, got shape {w.shape}")
    if not np.isfinite(w).all() or (w < 0).any():
        k = int(np.flatnonzero(~(np.isfinite(w) & (w >= 0)))[0])
        raise ValueError(f"{argument}: entry {k} is {w[k]}; expected finite numbers of at least 0")
    top = w.max()
    if top == 0:
        raise ValueError(f"{argument}: all are zero")
    w = w / top  # first, so that neither huge nor tiny weights overflow or underflow the sum
    return w / w.sum()
