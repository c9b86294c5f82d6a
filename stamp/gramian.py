"""The Gram matrix of K gradients, held centred at their weighted mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._look import may_look

WeightsLike = Sequence[float] | np.ndarray | Tensor


# A Gram matrix around z knows ||g_k||^2 to 4 eps (||z|| + ||g_k - z||)^2, some 16 eps ||z||^2 where g_k is short. Where
# task k binds alone, c ||g0|| / ||g_k|| times that stands in its gap, which is relative to c ||g0|| ||g_k|| or more:
# down to ||g_k|| = 2^-9 ||z|| at most 2^4 * 2^-52 * 2^18 = 2^-30, just within the 1e-9 that an answer is held to.
SHORT = 2.0**-18
# What a plain matrix says of the distances from the mean is a difference of terms of the size of ||g0||^2. Below this
# share of it, rounding may be all of it, and the centred matrix indefinite.
NEAR = 2.0**-30
NARROW = (torch.float32, torch.float16, torch.bfloat16, np.float32, np.float16)


@dataclass(frozen=True, eq=False)
class Gramian:
    """Inner products of K gradients ``g_k = g0 + e_k`` around a common vector ``g0``, in float64.

    ``<g_k, g_l> = n0 + h_k + h_l + H_kl``. Gradients of neighbouring tasks share a large part; the dense matrix drowns
    their differences in it, the three parts do not. The common vector is the weighted mean, unless a gradient is so
    much shorter (2^-9 and less) that its own length would drown in that of the mean: then it is the shortest gradient,
    or zero. It is zero, too, where a plain matrix was all there was, and one of its gradients is nearer the mean than
    that tells. Leading batch dimensions are allowed on all parts alike.

    Attributes:
        n0: ``||g0||^2`` of the common vector, shape ().
        h: ``<g0, e_k>``, shape (K,).
        H: ``<e_k, e_l>``, shape (K, K), symmetric.
        weights: the weights u of the tasks in the mean gradient, summing to 1, shape (K,); None stands for uniform
            ones.
        centre: the coefficients of the gradients whose sum the common vector is, shape (K,): of one of them (1 there
            and 0 elsewhere), or zeros. None: the mean under ``weights``.

    Raises:
        ValueError: shapes that do not belong together, or weights that are negative, not finite or do not sum to 1.
    """

    n0: Tensor
    h: Tensor
    H: Tensor
    weights: Tensor | None = None
    centre: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("n0", "h", "H"):
            object.__setattr__(self, name, _real(getattr(self, name), name))
        K = self.h.shape[-1] if self.h.ndim else 0
        if self.H.shape != (*self.h.shape, K) or self.n0.shape != self.h.shape[:-1]:
            shapes = f"n0 {tuple(self.n0.shape)}, h {tuple(self.h.shape)}, H {tuple(self.H.shape)}"
            raise ValueError(f"gramian: {shapes} do not belong together: expected (), (K,), (K, K)")
        for name in ("weights", "centre"):
            if (given := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, value := _real(given, name))
            if tuple(value.shape) not in ((K,), tuple(self.h.shape)):
                raise ValueError(f"gramian: {name} {tuple(value.shape)} do not belong to {K} gradients")
        if self.weights is not None:
            _check_shares(self.weights)

    @property
    def K(self) -> int:
        """The number of gradients."""
        return self.h.shape[-1]

    @property
    def squares(self) -> Tensor:
        """``||g_k||^2``, shape (K,); of rounding it may be below zero."""
        return self.n0[..., None] + 2 * self.h + self.H.diagonal(dim1=-2, dim2=-1)

    def dense(self) -> Tensor:
        """The plain Gram matrix ``G_kl = <g_k, g_l>``, shape (K, K), float64."""
        return self.n0[..., None, None] + self.h[..., :, None] + self.h[..., None, :] + self.H

    def to(self, device: torch.device | str) -> Gramian:
        """The same on a device; to and from a GPU in one transfer."""
        if self.H.device == torch.device(device):
            return self
        flat = torch.cat([part.reshape(-1) for part in (self.n0, self.h, self.H)]).to(device)
        sizes = (self.n0.numel(), self.h.numel(), self.H.numel())
        parts = [x.view(part.shape) for x, part in zip(flat.split(sizes), (self.n0, self.h, self.H), strict=True)]
        return Gramian(*parts, *(None if x is None else x.to(device) for x in (self.weights, self.centre)))

    def cpu(self) -> Gramian:
        """The same on the CPU; from a GPU in one transfer, which waits for it."""
        return self.to("cpu")

    @classmethod
    def from_dense(cls, G: Tensor | np.ndarray, weights: WeightsLike | None = None) -> Gramian:
        """Centre a plain Gram matrix, shape (K, K), at the mean under ``weights`` (default uniform).

        It stays plain, with a centre of zero, where a gradient is so short that centring would cost its digits, or
        so near the mean that the difference would be rounding, as it may be in any matrix of less than float64.
        """
        narrow = getattr(G, "dtype", None) in NARROW
        G = _real(G, "matrix")
        if G.ndim < 2 or G.shape[-1] != G.shape[-2] or not G.shape[-1]:
            raise ValueError(f"gramian: expected (K, K) with K at least 1, got {tuple(G.shape)}")
        u = torch.from_numpy(normalised_weights(weights, G.shape[-1])).to(G.device)
        n0, h, H = triple(G, u)
        kept = (G.diagonal(dim1=-2, dim2=-1) >= SHORT * n0[..., None]).all(-1) & distant(n0, H) & (not narrow)
        n0, h = torch.where(kept, n0, 0.0), torch.where(kept[..., None], h, 0.0)
        return cls(n0, h, torch.where(kept[..., None, None], H, G), u, u * kept[..., None])


def triple(G: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``n0``, ``h`` and ``H`` of a plain Gram matrix around ``sum_k v_k g_k``."""
    b = G @ v
    n0 = b @ v
    return n0, b - n0[..., None], G - b[..., :, None] - b[..., None, :] + n0[..., None, None]


def plain(G: Tensor, u: Tensor) -> Gramian:
    """The Gramian around zero of a plain matrix, shape (K, K), under the weights ``u``."""
    zeros = torch.zeros_like(G[0])
    return Gramian(zeros.sum(), zeros, G, u, zeros)


def distant(n0: Tensor, H: Tensor) -> Tensor:
    """Whether no gradient is so near the centre of a plain matrix's triple that its distance may be rounding: (...)."""
    return (H.diagonal(dim1=-2, dim2=-1) >= NEAR * n0[..., None]).all(-1)


def recentred(gramian: Gramian, about: Callable[[int], Gramian]) -> Gramian:
    """The Gramian around a centre beside which no gradient is short: as given, or what ``about`` gives.

    Args:
        gramian: of K gradients, on the host.
        about: reads the gradients again: k -> their Gramian around gradient k.
    """
    # Beside a long centre the shortest of several short ones is not known: each time it is known by 2^9 further down.
    for _ in range(gramian.K):
        squares = gramian.squares
        k = int(squares.argmin())
        if not float(squares[k]) < SHORT * float(gramian.n0):
            break
        gramian = about(k)
    return gramian


def one_hot(k: int, K: int) -> Tensor:
    """1 at position k, else 0: shape (K,), float64, on the CPU."""
    v = torch.zeros(K, dtype=torch.float64, device="cpu")
    v[k] = 1.0
    return v


def _real(numbers: Any, name: str) -> Tensor:
    """Detached float64 numbers on their own device."""
    try:
        value = as_tensor(numbers).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"gramian: {name}: expected numbers ({error})") from None
    if value.is_complex():
        raise ValueError(f"gramian: {name}: expected real numbers, got {value.dtype}")
    return value.to(torch.float64)


def _check_shares(weights: Tensor) -> None:
    """Refuse weights that are none, where they may be looked at without waiting for a GPU."""
    if weights.device.type != "cpu" or not may_look(weights.device):
        return
    least, totals = float(weights.min()), weights.sum(-1)
    if not (least >= 0 and bool(((totals - 1).abs() <= 1e-6).all())):
        raise ValueError(
            "gramian: weights: expected numbers of at least 0 that sum to 1, "
            f"got a sum of {totals.flatten()[0]:.9g} and a smallest of {least:.3g}"
        )


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
        weights = weights.detach().cpu()
        weights = (weights if weights.is_complex() else weights.to(torch.float64)).numpy()  # numpy has no bfloat16
    try:
        if np.iscomplexobj(weights):
            raise TypeError("they are complex")
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
