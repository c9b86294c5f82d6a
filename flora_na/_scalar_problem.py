"""The two least-squares problems that FLoRA-NA's scalars alternate between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedgram import kernels

from ._scalar_newton import newton_step
from .coefficients import inverse_or_zero, solve_psd, trace_product
from .energies import ROUNDING, energies, factor_norms, mass_of_target, rounding
from .group import Group
from .members import Side
from .pair_products import PairProducts

DIRECT_MEMBERS = 64
"""Without Grams, up to this many members per rank their U x U normal matrix is formed in every half-step; above, it
would cost more than the products of some conjugate-gradient steps."""


@dataclass(frozen=True, eq=False)
class HalfStep:
    """The exact minimiser in one side's coefficients, with the normal equations it solves (in the free ones)."""

    coefficients: Tensor
    gain: Tensor
    """(L,) the drop of the squared error."""
    captured: Tensor
    """(L,) by how much the squared error after it is below ``||dW||^2``."""
    H: Tensor | None
    rest: Tensor
    """(L, n) half the negative gradient before it."""


class Problem:
    """The two least-squares problems, per module or (``shared``) summed over all modules of all groups."""

    def __init__(self, groups: Sequence[Group], shared: bool, cg_steps: int) -> None:
        self.groups, self.shared, self.cg_steps = groups, shared, cg_steps
        self.anchored = groups[0].anchored
        self.formed = all(g.gram is not None for g in groups)
        few = self.formed and all(PairProducts.fits(g) for g in groups)
        self.products = PairProducts.of(groups, self.collect) if few else None
        self.direct = self.formed or all(len(g.ranks) <= DIRECT_MEMBERS * g.rank for g in groups)

    def start(self) -> Tensor:
        return self.groups[0].weights[:1] if self.shared else self.groups[0].weights

    def balanced_start(self) -> tuple[Tensor, Tensor]:
        """p and q of the averages, had every member's two factors one norm; 0 for a member without an update."""
        squares = [[x.square().sum(-1) for x in both] for both in self._member_norms]
        b, a = (self.collect(list(side)) for side in zip(*squares, strict=True))
        ratio = torch.where((b > 0) & (a > 0), a * inverse_or_zero(b), 0.0).sqrt().sqrt()
        return self.start() * ratio, self.start() * inverse_or_zero(ratio)

    def spread(self, p: Tensor, group: Group) -> Tensor:
        return p.expand(len(group.targets), -1)

    def collect(self, parts: list[Tensor]) -> Tensor:
        """Per-module quantities (L, ...) as they are, or summed to (1, ...) where one p serves all modules."""
        return torch.cat(parts).sum(0, keepdim=True) if self.shared else parts[0]

    def energy(self) -> Tensor:
        """``||dW||^2`` where it is there for nothing, or will be needed for rho anyway."""
        return self.collect([g.gram_energy if g.gram is not None else energies(g) for g in self.groups])

    def lost(self, p: Tensor, q: Tensor) -> Tensor:
        """(L,) what rounding may make of the squared error at p, q; without Grams what it would with them."""
        masses = []
        for g, (B, A) in zip(self.groups, self._member_norms, strict=True):
            sums = (self.spread(p, g).abs().unsqueeze(1) @ B) * (self.spread(q, g).abs().unsqueeze(1) @ A)
            masses.append((mass_of_target(g) + sums.sum((-2, -1))).square())
        return ROUNDING["float64"] * self.collect(masses)

    @cached_property
    def _member_norms(self) -> list[tuple[Tensor, Tensor]]:
        """Per group and side (L, M, rank), of every column of a member's B, and row of its A."""
        found = []
        for g in self.groups:
            norms = factor_norms(g)
            B, A = (g.membership.mT @ (norms[side].unsqueeze(-1) * g.selector) for side in ("B", "A"))
            found.append((B, A))
        return found

    def half_step(self, side: Side, p: Tensor, q: Tensor) -> HalfStep:
        """The exact step in p with q fixed."""
        free, lift = (_free, _lift) if self.anchored else (_same, _same)
        if self.direct:
            H, h = self._equations(side, q)
            whole = h - (H @ p.unsqueeze(-1)).squeeze(-1)
            rest, H_free = free(whole), free(free(H).mT).mT
            step, gain = solve_psd(H_free, rest)
        else:
            normal = self._normal(side, q)
            h = self.collect([n.h for n in normal])

            def product(x: Tensor) -> Tensor:
                return self.collect([n.product(self.spread(x, n.group)) for n in normal])

            whole = h - product(p)
            H_free, rest = None, free(whole)
            flat = self.collect([n.flat for n in normal])
            step, gain = conjugate_gradients(lambda x: free(product(lift(x))), rest, self.cg_steps, flat)
        before, p = p, p + lift(step)
        # at the best of all p the product is orthogonal to what is left of dW; at the best that sums to 1 it is not
        captured = ((h + whole) * before).sum(-1) + gain if self.anchored else (h * p).sum(-1)
        return HalfStep(p, gain, captured, H_free, rest)

    def newton(self, p: Tensor, q: Tensor, of_p: HalfStep, of_q: HalfStep) -> tuple[Tensor, Tensor]:
        """Newton's step in q at a p that is best for it, and what it promises (``newton_step``): -1 for no step."""
        if self.products is None or of_p.H is None or of_q.H is None:
            return torch.zeros_like(q), torch.full_like(q[:, 0], -1.0)
        C = self.products.cross(p, q)
        if not self.anchored:
            return newton_step(of_p.H, C, of_q.H, of_q.rest, q)
        step, promised = newton_step(of_p.H, _free(_free(C).mT).mT, of_q.H, of_q.rest, None)
        return _lift(step), promised

    def _equations(self, side: Side, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.products is not None:
            return self.products.equations(side, q)
        normal = self._normal(side, q)
        return self.collect([n.matrix() for n in normal]), self.collect([n.h for n in normal])

    def _normal(self, side: Side, q: Tensor) -> list[_Normal]:
        other: Side = "A" if side == "B" else "B"
        return [_Normal(g, side, other, self.spread(q, g)) for g in self.groups]

    def hold_gauge(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of one size, by powers of two: ``(c p, q / c)`` would drift off where p or q is all but free."""
        if self.anchored:
            return p, q
        sizes = [x.abs().amax(-1, keepdim=True).clamp_min(1e-300).log2() for x in (p, q)]
        c = ((sizes[1] - sizes[0]) / 2).round().exp2()
        return p * c, q / c

    def normalise_gauge(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Norms of B and A within a factor of two; an anchor fixes the gauge, so then nothing is changed."""
        if self.anchored:
            return p, q
        if self.products is not None:
            b, a = self.products.square("B", p), self.products.square("A", q)
        else:
            b = self.collect([_square(g, "B", self.spread(p, g)) for g in self.groups])
            a = self.collect([_square(g, "A", self.spread(q, g)) for g in self.groups])
        ratio = even_norms(b, a).unsqueeze(-1)
        return p * ratio, q / ratio


def even_norms(b: Tensor, a: Tensor) -> Tensor:
    """c, a power of two so that it costs no rounding in any type, that brings ``||c B||`` and ``||A / c||`` together.

    Within a factor of two; from their squares, b and a.
    """
    return torch.where((a > 0) & (b > 0), (a / b.clamp_min(1e-300)).clamp_min(1e-300).log2().div(4).round().exp2(), 1.0)


class _Normal:
    """Normal equations of one side of one group: ``H p = h`` of docs/math.md 1.3."""

    def __init__(self, group: Group, side: Side, other: Side, q: Tensor) -> None:
        self.group, self.side = group, side
        Y = group.expand(q)
        C = group.apply(other, Y)
        self.S = Y.mT @ C
        self.h = self.traces(group.apply(side, group.D * C))

    def matrix(self) -> Tensor:
        """``H_ik = tr(B_i^T B_k S)``, (L, M, M)."""
        if self.group.gram is None:
            return self._matrix_from_factors()
        tiled = self.group.selector @ self.S @ self.group.selector.mT
        return self.group.member_blocks(self.group.gram[self.side] * tiled)

    def _matrix_from_factors(self) -> Tensor:
        targets = self.group.targets
        if self.side == "B":
            H, _ = kernels.factor_traces([t.B for t in targets], None, list(self.S), None)
        else:
            _, H = kernels.factor_traces(None, [t.A for t in targets], None, list(self.S))
        scale = torch.stack([t.scale_B if self.side == "B" else t.scale_A for t in targets]).to(self.group.device)
        return torch.stack(H or []) * scale.unsqueeze(-1) * scale.unsqueeze(-2)

    def traces(self, Z: Tensor) -> Tensor:
        """``tr(Z_i)`` of every member's block of Z (L, R, r): (L, M)."""
        return self.group.sum_members((Z * self.group.selector).sum(-1))

    @property
    def flat(self) -> Tensor:
        """(L,) the rounding of H, from a bound on its trace."""
        squares = factor_norms(self.group)[self.side].square().sum(-1)
        return rounding(self.group) * self.S.diagonal(dim1=-2, dim2=-1).sum(-1) * squares

    def product(self, p: Tensor) -> Tensor:
        """``H p`` without H."""
        return self.traces(self.group.apply(self.side, self.group.expand(p)) @ self.S)


def _square(group: Group, side: Side, p: Tensor) -> Tensor:
    P = group.expand(p)
    return trace_product(P, group.apply(side, P))


def _same(x: Tensor) -> Tensor:
    return x


def _free(x: Tensor) -> Tensor:
    """Drop the anchor's coefficient, which is 1 minus the others: the transpose of ``_lift``."""
    return x[..., :-1] - x[..., -1:]


def _lift(x: Tensor) -> Tensor:
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], g: Tensor, steps: int, flat: Tensor
) -> tuple[Tensor, Tensor]:
    """A few steps on ``H x = g`` from 0, batched over the leading axis; every step lowers the error.

    A direction d of ``d^T H d <= flat ||d||^2`` is not followed: by rounding g has a part where H is singular (clients
    that are multiples of each other), and the step along it would have no end. ``flat`` (L,) is the rounding of H.
    """
    scale = inverse_or_zero(g.abs().amax(-1, keepdim=True))  # so that no square leaves float64's range
    x, r, d = torch.zeros_like(g), g * scale, g * scale
    rr = (r * r).sum(-1, keepdim=True)
    gain, floor, flat = torch.zeros_like(rr), 1e-12 * rr, flat.unsqueeze(-1) * scale
    for _ in range(steps):
        Hd = matvec(d) * scale
        dHd = (d * Hd).sum(-1, keepdim=True)
        steep = dHd > flat * (d * d).sum(-1, keepdim=True)
        alpha = torch.where(steep & (rr > floor), rr / dHd.clamp_min(1e-300), 0.0)
        x, r = x + alpha * d, r - alpha * Hd
        gain = gain + alpha * rr
        new = (r * r).sum(-1, keepdim=True)
        d = r + torch.where(rr > 0, new / rr.clamp_min(1e-300), 0.0) * d
        rr = new
    return x, (gain * inverse_or_zero(scale)).squeeze(-1)
