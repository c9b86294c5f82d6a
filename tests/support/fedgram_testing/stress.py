"""Families of client factors that break careless arithmetic, and a float64 reference that survives their scales."""

from dataclasses import dataclass

import torch

EPS64 = 2.0**-52
FAMILIES = (
    "random",
    "common",
    "duplicates",
    "opposite",
    "nearly-opposite",
    "ill",
    "one-ill",
    "faint",
    "gauge",
    "hollow",
)


def draw(family, count, rank, m, n, *, condition=1e12, seed=0):
    """float64 factors of ``count`` clients with entries around 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, A = [normal(m, rank) for _ in range(count)], [normal(rank, n) for _ in range(count)]
    falling = torch.logspace(0, -torch.tensor(condition).log10().item(), rank, dtype=torch.float64)
    if family == "common":
        B, A = [B[0] + 0.3 * b for b in B], [A[0] + 0.3 * a for a in A]
    elif family == "duplicates":
        B, A = [B[0]] * count, [A[0]] * count
    elif family in ("opposite", "nearly-opposite"):
        spread = 0.0 if family == "opposite" else 1e-6
        B, A = [B[0] * (-1) ** u + spread * b for u, b in enumerate(B)], [A[0]] * count
    elif family == "ill":  # the two sides run against each other
        B, A = [b * falling for b in B], [a * falling.flip(0)[:, None] for a in A]
    elif family == "one-ill":
        B = [b * falling for b in B]
    elif family == "faint":  # each client fainter than the one before
        B = [b * condition ** (-u / max(count - 1, 1)) for u, b in enumerate(B)]
    elif family == "gauge":  # (cB, A / c): the same update
        factors = [condition ** (u % 3 - 1) for u in range(count)]
        B, A = [b * c for b, c in zip(B, factors, strict=True)], [a / c for a, c in zip(A, factors, strict=True)]
    elif family == "hollow":  # zero rows, columns and clients, repeated rows
        A = [a.clone() for a in A]
        for u in range(count):
            A[u][1:] = A[u][:1]
            B[u][:, u % rank] = 0
        B[-1] = torch.zeros_like(B[-1])
    return B, A


@dataclass(frozen=True)
class Reference:
    """dW of the factors as stored, with the two scales taken out.

    Attributes:
        W: dW over ``unit``, float64.
        unit: the product of the scales.
        mass: ``sum w ||B_u|| ||A_u|| / ||W||``: how much was added up for what is left.
    """

    W: torch.Tensor
    unit: float
    mass: float

    @property
    def norm(self):
        return float(self.W.norm())

    def divergence(self, B, A):
        """``||W - BA|| / ||W||`` of a returned pair."""
        root = self.unit**0.5
        return float((self.W - (B.double() / root) @ (A.double() / root)).norm()) / self.norm

    def optimum(self, rank):
        s = torch.linalg.svdvals(self.W)
        return float(s[rank:].norm() / s.norm())

    def loss(self, e):
        """What rounding the pair ``e`` to its dtype may add to rho: eps/2 of every entry of both factors."""
        size = float((e.B.double() / self.unit**0.5).norm() * (e.A.double() / self.unit**0.5).norm())
        return torch.finfo(e.B.dtype).eps * size / self.norm

    def blur(self, rho):
        """By how much, relatively, a solve on Grams may miss a small rho: their rounding beside its square.

        Where that would be more than 2.5e-4 (``MARGIN``), QR factors take over.
        """
        return min(2.5e-4, 2.0**-50 * (self.mass / rho) ** 2) if rho > 0 else 0.0

    def doubt(self, e):
        """The rounding of ``divergence`` itself, on factors that are large beside their product."""
        return self.loss(e) / torch.finfo(e.B.dtype).eps * 16 * EPS64

    @property
    def floor(self):
        """What float64 sums over the clients lose of rho: a few roundings of every term."""
        return 64 * EPS64 * self.mass


def reference(B, A, weights, scale_B, scale_A):
    """Of factors that carry the given scales."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    B, A = [b.double() / scale_B for b in B], [a.double() / scale_A for a in A]
    W = sum(c * b @ a for c, b, a in zip(w, B, A, strict=True))
    mass = sum(float(c * b.norm() * a.norm()) for c, b, a in zip(w, B, A, strict=True))
    return Reference(W, scale_B * scale_A, mass / float(W.norm()) if W.any() else float("inf"))
