"""FLoRA-NA's estimator: one scalar per client and side, ``B = sum p_u B_u`` and ``A = sum q_u A_u``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._scalar_problem import HalfStep, Problem
from ._scalar_solver import certified_pair, doubtful_modules
from .coefficients import Ended, ScalarPair
from .energies import MARGIN, energies
from .group import Group

GAUGE_SWEEPS = 4
LEAST_RATE = 1e-4
"""At which sweeps are trusted to converge; one drop may be this small beside the last by chance."""
FINER = 1e-4
"""Where Grams are formed on a CPU a sweep costs little: it goes on to a tolerance this much finer, so that modules end
in one place whatever company they were solved in."""

UNSEEN = 1e-6
"""A squared error this small beside ``||dW||^2`` need not be resolved to call a descent converged."""


@dataclass(frozen=True, eq=False)
class Scalars:
    """p and q of one group, (L, M) float64 each, and how they were reached."""

    p: Tensor
    q: Tensor
    status: str
    sweeps: int
    left: Tensor
    """(L,) the squared error ``||dW - BA||^2`` as the Grams have it; of all modules together where they share p, q."""
    unresolved: Tensor
    """(L,) where rounding of the Grams could be more than all of it, and is not small beside ``||dW||^2``."""

    def ended(self, group: Group) -> tuple[str, int, Ended | None]:
        """Status and sweeps, of the group and where they differ of its modules."""
        if not bool(self.unresolved.any()):
            return self.status, self.sweeps, None
        each = self.unresolved.expand(len(group.targets)).tolist()
        ended = tuple(("unresolved" if doubt else self.status, self.sweeps) for doubt in each)
        return "unresolved", self.sweeps, ended


@dataclass(frozen=True)
class ScalarLeastSquares:
    """Exact least squares for p and q (the P and Q of arXiv:2509.26399), in turns, hastened by Newton's step.

    The authors fit p and q by 200 steps of AdamW on the dense products, with a uniform target, weight decay and one
    pair for all layers. Here each half-step is the exact minimiser of ``||dW - BA||`` in one of the two, so the
    objective never rises above that of ``fedavg``, where it starts, on the way to a local optimum. With few members q
    takes Newton's step instead (p following at its best), unless that ends above the exact one's error. With an anchor
    ``(B_g, A_g)`` the estimate is ``A_g + sum q_u (A_u - A_g)``: the coefficients, the anchor's included, sum to 1
    (under ``missing="zero"`` to the weight of the clients that have the module).

    Attributes:
        tolerance: stop once a sweep lowers the squared error by less than this fraction of it (``FINER`` of it with
            Grams on a CPU), or Newton's step would, or all sweeps to come by less than a tenth of that, if they go on
            shrinking as the last two did.
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
        return certified_pair(group, **self._limits)

    def doubtful(self, group: Group) -> list[int]:
        """Positions of the modules for whose sake ``certified`` leaves the group to ``solve``."""
        return doubtful_modules(group, **self._limits)

    @property
    def _limits(self) -> dict[str, Any]:
        return {"tolerance": FINER * self.tolerance, "coarse": self.tolerance, "max_sweeps": self.max_sweeps}

    def _alternate(self, groups: Sequence[Group], *, shared: bool) -> list[Scalars]:
        problem = Problem(groups, shared, self.cg_steps)
        descent = _Descent(problem, self.tolerance)
        status, sweep = "max-sweeps", 0
        for sweep in range(1, self.max_sweeps + 1):
            if descent.sweep():
                status = "converged"
                break
            if sweep % GAUGE_SWEEPS == 0:
                descent.hold_gauge()
        else:
            status = "converged" if descent.nearly_done(self.tolerance) else status
        best = descent.best
        p, q = problem.normalise_gauge(best.p, best.q)
        found = (status, sweep, best.error, descent.unresolved)
        return [Scalars(problem.spread(p, g), problem.spread(q, g), *found) for g in groups]


@dataclass(frozen=True, eq=False)
class _Point:
    """Scalars p, q of the modules of a problem, with their squared error and what of it is rounding, (L,) each."""

    p: Tensor
    q: Tensor
    error: Tensor
    lost: Tensor

    @property
    def at_most(self) -> Tensor:
        """(L,) the squared error with all that rounding may hide."""
        return self.error + self.lost

    def or_where(self, chosen: Tensor, other: _Point) -> _Point:
        """This one, and another where ``chosen`` (L,)."""
        at = chosen.unsqueeze(-1)
        p, q = torch.where(at, other.p, self.p), torch.where(at, other.q, self.q)
        return _Point(p, q, torch.where(chosen, other.error, self.error), torch.where(chosen, other.lost, self.lost))


class _Descent:
    """The iteration on one problem, all its modules in step.

    Where normal equations are near singular, what is left of the error is rounding, and steps along what they do not
    resolve lead ever further away. So no drop below the rounding counts, and a module is done once its error with the
    rounding in it rises.

    Attributes:
        p, q: where the next sweep starts: q is Newton's where that served.
        exact_q: the best q for p.
        best: the pair of least error, what may be rounding added to it, among the averages and all p with exact_q.
    """

    best: _Point

    def __init__(self, problem: Problem, tolerance: float) -> None:
        self.problem = problem
        self.p = self.q = self.exact_q = problem.start()
        self.energy = problem.energy()
        self.zero = problem.collect([energies(g) for g in problem.groups]) == 0
        self.tolerance = tolerance * (FINER if problem.formed and self.energy.device.type == "cpu" else 1.0)
        self._gain = torch.zeros_like(self.energy)
        self._sweeps = 0
        self._lost_way = torch.zeros_like(self.zero)
        # of the error at a q of Newton's, which is refused above it
        self._bound = torch.full_like(self.energy, torch.inf)

    def sweep(self) -> bool:
        """One exact step in p, one in q, and Newton's from there on; whether no module has more to gain."""
        refused, of_p, of_q = self._exact_steps()
        before, self._gain = self._gain, of_p.gain + of_q.gain
        self._sweeps += 1
        self.p, self.exact_q = of_p.coefficients, of_q.coefficients
        here = self._point(self.p, self.exact_q, self.energy - of_q.captured)
        rises = ~(here.at_most <= self.best.at_most)
        self._lost_way = self._lost_way | rises
        self.best = self.best.or_where(~rises, here)
        step, promised = self.problem.newton(self.p, self.q, of_p, of_q)
        promised = torch.where(refused, -1.0, promised)
        left = here.error.clamp_min(1e-13 * self.energy)
        enough = torch.maximum(self.tolerance * left, here.lost)
        crawled = (self._gain <= enough) | (self._to_come(before) <= 0.1 * enough)
        done = torch.where(promised.isfinite() & (promised >= 0), promised <= enough, crawled)
        hasty = promised > enough
        self._bound = torch.where(hasty, left, torch.inf)
        self.q = torch.where(hasty.unsqueeze(-1), self.q + step, self.exact_q)
        return bool((self.zero | done | self._lost_way).all())

    def _started(self, of_p: HalfStep) -> HalfStep:
        """The first step. Averages worse than nothing are no start: clients split their updates unevenly over B and A.

        Then it is from the averages of factors with ``||B_u|| = ||A_u||``; a step from anywhere is better than nothing.
        """
        self.best = self._point(self.p, self.q, self.energy - of_p.captured + of_p.gain)
        worthless = self.best.error > self.energy
        if self.problem.anchored or not bool(worthless.any()):
            return of_p
        p, q = self.problem.balanced_start()
        at = worthless.unsqueeze(-1)
        self.p, self.q = torch.where(at, p, self.p), torch.where(at, q, self.q)
        self.exact_q = self.q
        of_p = self.problem.half_step("B", self.p, self.q)
        here = self._point(self.p, self.q, self.energy - of_p.captured + of_p.gain)
        self.best = self.best.or_where(here.at_most < self.best.at_most, here)
        return of_p

    @property
    def unresolved(self) -> Tensor:
        """(L,) where the best error is within what rounding may make of it, and that could be seen in rho."""
        doubt = MARGIN * self.best.lost
        return ~self.zero & ~(self.best.error > doubt) & ~(self.best.lost <= UNSEEN * self.energy)

    def _point(self, p: Tensor, q: Tensor, error: Tensor) -> _Point:
        return _Point(p, q, error, self.problem.lost(p, q))

    def _exact_steps(self) -> tuple[Tensor, HalfStep, HalfStep]:
        of_p = self.problem.half_step("B", self.p, self.q)
        of_p = of_p if self._sweeps else self._started(of_p)
        refused = self.energy - of_p.captured > self._bound
        if self.problem.products is not None and bool(refused.any()):
            self.q = torch.where(refused.unsqueeze(-1), self.exact_q, self.q)
            of_p = self.problem.half_step("B", self.p, self.q)
        return refused, of_p, self.problem.half_step("A", self.q, of_p.coefficients)

    def _to_come(self, before: Tensor) -> Tensor:
        """All later drops, if they go on as the last two did; the first, from the averages, is no measure of that."""
        if self._sweeps < 3:
            return torch.full_like(self._gain, torch.inf)
        return self._gain * (self._gain / (before - self._gain).clamp_min(1e-300)).clamp_min(LEAST_RATE)

    def nearly_done(self, tolerance: float) -> bool:
        """Whether the last sweep gained no more than this part of the error in any module."""
        left = self.best.error.clamp_min(1e-13 * self.energy)
        return bool((self.zero | self._lost_way | (self._gain <= tolerance * left)).all())

    def hold_gauge(self) -> None:
        """Keep p and q of one size, which alternating steps do not (Newton's do)."""
        if not bool(self._bound.isfinite().any()):
            self.p, self.q = self.problem.hold_gauge(self.p, self.exact_q)
            self.exact_q = self.q
