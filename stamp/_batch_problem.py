"""Many duals at once in torch: what ``_problem.Problem`` is for one, with a leading batch dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import EPS
from .gramian import distant

TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of duals; the fields are those of ``_problem.Problem``, with a batch dimension B in front."""

    n: Tensor  # (B,)
    h: Tensor  # (B, K)
    H: Tensor  # (B, K, K)
    u: Tensor  # (B, K)
    c: float
    beta: Tensor  # (B, K)
    constant: Tensor  # (B,)
    n0: Tensor  # (B,)
    root: Tensor  # (B, K)
    norms: Tensor  # (B, K)

    @property
    def s(self) -> Tensor:
        """``c ||g0||``, shape (B,)."""
        return self.c * self.n0.sqrt()

    @property
    def diagonal(self) -> Tensor:
        """``H_kk``, shape (B, K)."""
        return self.H.diagonal(dim1=1, dim2=2)

    def reach(self, w: Tensor) -> Tensor:
        """The lengths summed in ``g_w``, shape (B,)."""
        return self.n.clamp(min=0).sqrt() + (self.root * w).sum(-1)

    def product(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``y = Hw + h`` and ``||g_w||^2``."""
        y = times(self.H, w) + self.h
        return y, self.n + (self.h * w).sum(-1) + (y * w).sum(-1)

    def slope(self, y: Tensor, q: Tensor) -> Tensor:
        """The gradient of the objective up to a constant."""
        return self.beta + (self.s / q.clamp(min=TINY).sqrt())[:, None] * y


def times(H: Tensor, w: Tensor) -> Tensor:
    return (H @ w[..., None])[..., 0]


def pick(x: Tensor, k: Tensor) -> Tensor:
    return x.gather(-1, k[:, None])[:, 0]


def row_of(H: Tensor, k: Tensor) -> Tensor:
    return H.gather(1, k[:, None, None].expand(-1, 1, H.shape[2]))[:, 0]


def one_at(k: Tensor, K: int) -> Tensor:
    """One-hot mask of the indices, shape (B, K)."""
    return torch.arange(K, device=k.device) == k[:, None]


def build(parts: tuple[Tensor, ...], u: Tensor, c: float) -> Batch:
    """From (n0, h, H) or a plain (G,), each plain matrix centred where no gradient is short against the mean."""
    if len(parts) == 3:
        n, h, H = parts
    else:
        (G,) = parts
        b = times(G, u)
        n = (b * u).sum(-1)
        h, H = b - n[:, None], G - b[:, :, None] - b[:, None, :] + n[:, None, None]
        keep = (H.diagonal(dim1=1, dim2=2).amax(-1) <= n / 4) & distant(n, H)
        n, h = torch.where(keep, n, 0.0), torch.where(keep[:, None], h, 0.0)
        H = torch.where(keep[:, None, None], H, G)
    H = (H + H.transpose(1, 2)) / 2
    y = times(H, u) + h
    n0 = n + (h * u).sum(-1) + (y * u).sum(-1)
    diagonal = H.diagonal(dim1=1, dim2=2)
    base, root = n.clamp(min=0).sqrt(), diagonal.clamp(min=0).sqrt()
    squares = n[:, None] + 2 * h + diagonal
    norms = torch.where(squares > 16 * EPS * (base[:, None] + root) ** 2, squares, 0.0).clamp(min=0).sqrt()
    n0 = torch.where(n0 <= 16 * EPS * (base + (root * u).sum(-1)) ** 2, 0.0, n0)
    return Batch(n, h, H, u, c, y, n + (h * u).sum(-1), n0, root, norms)
