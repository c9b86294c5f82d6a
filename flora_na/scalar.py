"""FLoRA-NA's estimator: one scalar per client and side, ``B = sum p_u B_u`` and ``A = sum q_u A_u``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgram import kernels

from ._scalar_solver import certified_pair
from .coefficients import ScalarPair, inverse_or_zero, solve_psd, trace_product
from .divergence import energies
from .group import Group, Side
from .pair_products import PairProducts

DIRECT_MEMBERS = 64
"""Without Grams, up to this many members per rank their U x U normal matrix is formed in every half-step; above, it
would cost more than the products of some conjugate-gradient steps."""

GAUGE_SWEEPS = 4
FINER = 1e-4
"""Where Grams are formed on a CPU a sweep costs little: it goes on to a tolerance this much finer, so that modules end
in one place whatever company they were solved in."""


@dataclass(frozen=True, eq=False)
class Scalars:
    """p and q of one group, (L, M) float64 each, and how they were reached."""

    p: Tensor
    q: Tensor
    status: str
    sweeps: int
    left: Tensor
    """(L,) the squared error ``||dW - BA||^2`` as the Grams have it; of all modules together where they share p, q."""


@dataclass(frozen=True)
class ScalarLeastSquares:
    """Alternating exact least squares for p and q (the P and Q of arXiv:2509.26399).

    The authors fit p and q by 200 steps of AdamW on the dense products, with a uniform target, weight decay and one
    pair for all layers. Here each half-step is the exact minimiser of ``||dW - BA||`` in one of the two, so the
    objective never rises above that of ``fedavg``, where it starts. With an anchor ``(B_g, A_g)`` the estimate is
    ``A_g + sum q_u (A_u - A_g)``: the coefficients, the anchor's included, sum to 1.

    Attributes:
        tolerance: stop once a sweep lowers the squared error by less than this fraction of it (``FINER`` of it with
            Grams on a CPU), or all sweeps to come by less than a tenth of that, if they go on shrinking as the last
            two did.
        max_sweeps: an upper bound on the sweeps.
        cg_steps: with very many members in the implicit regime a half-step is this many conjugate-gradient steps.
    """

    tolerance: float = 1e-6
    max_sweeps: int = 100
    cg_steps: int = 12

    def solve(self, groups: Sequence[Group], *, shared: bool = False) -> list[Scalars]:
        """p and q for every group; ``shared``: one p and one q for all modules (as the authors' code has it)."""
        if shared:
            return self._alternate(groups, shared=True)
        return [self._alternate([group], shared=False)[0] for group in groups]

    def certified(self, group: Group) -> ScalarPair | None:
        """The compiled solver's answer, or None where it leaves the group to ``solve``."""
        fine = FINER * self.tolerance
        return certified_pair(group, tolerance=fine, coarse=self.tolerance, max_sweeps=self.max_sweeps)

    def _alternate(self, groups: Sequence[Group], *, shared: bool) -> list[Scalars]:
        problem = _Problem(groups, shared, self.cg_steps)
        p = q = problem.start()
        energy, zero = problem.energy(), problem.collect([energies(g) for g in groups]) == 0
        captured, coarse = torch.zeros_like(energy), torch.zeros_like(energy, dtype=torch.bool)
        status, sweep, before = "max-sweeps", 0, torch.zeros_like(p[:, 0])
        fine = self.tolerance * (FINER if problem.formed and energy.device.type == "cpu" else 1.0)
        for sweep in range(1, self.max_sweeps + 1):
            p, gain_p, _ = problem.improve("B", p, q)
            q, gain_q, captured = problem.improve("A", q, p)
            left = (energy - captured).clamp_min(1e-13 * energy)
            gain = gain_p + gain_q
            rest = gain * gain / (before - gain).clamp_min(1e-300)
            enough = torch.maximum(fine * left, 1e-19 * energy)
            coarse = zero | (gain <= self.tolerance * left)
            if bool((zero | (gain <= enough) | (rest <= 0.1 * enough)).all()):
                status = "converged"
                break
            before = gain
            if sweep % GAUGE_SWEEPS == 0:
                p, q = problem.hold_gauge(p, q)
        else:
            status = "converged" if bool(coarse.all()) else status
        p, q = problem.normalise_gauge(p, q)
        return [Scalars(problem.spread(p, g), problem.spread(q, g), status, sweep, energy - captured) for g in groups]


class _Problem:
    """The two least-squares problems, per module or (``shared``) summed over all modules of all groups."""

    def __init__(self, groups: Sequence[Group], shared: bool, cg_steps: int) -> None:
        self.groups, self.shared, self.cg_steps = groups, shared, cg_steps
        self.formed = all(g.gram is not None for g in groups)
        few = self.formed and all(PairProducts.fits(g) for g in groups)
        self.products = PairProducts.of(groups, self.collect) if few else None
        self.direct = self.formed or all(len(g.ranks) <= DIRECT_MEMBERS * g.rank for g in groups)

    def start(self) -> Tensor:
        return self.groups[0].weights[:1] if self.shared else self.groups[0].weights

    def spread(self, p: Tensor, group: Group) -> Tensor:
        return p.expand(len(group.targets), -1)

    def collect(self, parts: list[Tensor]) -> Tensor:
        """Per-module quantities (L, ...) as they are, or summed to (1, ...) where one p serves all modules."""
        return torch.cat(parts).sum(0, keepdim=True) if self.shared else parts[0]

    def energy(self) -> Tensor:
        """``||dW||^2`` where it is there for nothing, or will be needed for rho anyway."""
        return self.collect([g.gram_energy if g.gram is not None else energies(g) for g in self.groups])

    def improve(self, side: Side, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exact step in p with q fixed; the drop of the squared error, and ``<dW, BA>`` after it."""
        free, lift = (_free, _lift) if self.groups[0].anchored else (_same, _same)
        if self.direct:
            H, h = self._equations(side, q)
            step, gain = solve_psd(free(free(H).mT).mT, free(h - (H @ p.unsqueeze(-1)).squeeze(-1)))
        else:
            normal = self._normal(side, q)
            h = self.collect([n.h for n in normal])

            def product(x: Tensor) -> Tensor:
                return self.collect([n.product(self.spread(x, n.group)) for n in normal])

            step, gain = _conjugate_gradients(lambda x: free(product(lift(x))), free(h - product(p)), self.cg_steps)
        p = p + lift(step)
        return p, gain, (h * p).sum(-1)

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
        if self.groups[0].anchored:
            return p, q
        sizes = [x.abs().amax(-1, keepdim=True).clamp_min(1e-300).log2() for x in (p, q)]
        c = ((sizes[1] - sizes[0]) / 2).round().exp2()
        return p * c, q / c

    def normalise_gauge(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Equal norms of B and A; an anchor fixes the gauge, so then nothing is changed."""
        if self.groups[0].anchored:
            return p, q
        if self.products is not None:
            b, a = self.products.square("B", p), self.products.square("A", q)
        else:
            b = self.collect([_square(g, "B", self.spread(p, g)) for g in self.groups])
            a = self.collect([_square(g, "A", self.spread(q, g)) for g in self.groups])
        ratio = torch.where((a > 0) & (b > 0), (a / b.clamp_min(1e-300)) ** 0.25, 1.0).unsqueeze(-1)
        return p * ratio, q / ratio


class _Normal:
    """Normal equations of one side of one group: ``H p = h`` of MATH.md 1.3."""

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


def _conjugate_gradients(matvec: Callable[[Tensor], Tensor], g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A few steps on ``H x = g`` from 0, batched over the leading axis; every step lowers the error."""
    scale = inverse_or_zero(g.abs().amax(-1, keepdim=True))  # so that no square leaves float64's range
    x, r, d = torch.zeros_like(g), g * scale, g * scale
    rr = (r * r).sum(-1, keepdim=True)
    gain, floor = torch.zeros_like(rr), 1e-12 * rr
    for _ in range(steps):
        Hd = matvec(d) * scale
        dHd = (d * Hd).sum(-1, keepdim=True)
        alpha = torch.where((dHd > 0) & (rr > floor), rr / dHd.clamp_min(1e-300), 0.0)
        x, r = x + alpha * d, r - alpha * Hd
        gain = gain + alpha * rr
        new = (r * r).sum(-1, keepdim=True)
        d = r + torch.where(rr > 0, new / rr.clamp_min(1e-300), 0.0) * d
        rr = new
    return x, (gain * inverse_or_zero(scale)).squeeze(-1)
