"""The squared errors behind ``rho = ||dW - BA|| / ||dW||``, certified to three digits.

From Grams a squared error is a difference of nearly equal numbers when rho is small. So every value is held against
the rounding error of what was subtracted; where three digits are not safe, the norm is taken again from the factors
of the residual in float64 (``kernels.lowrank_norm``), without any difference of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedgram import kernels

from .coefficients import AnyPair, Evidence, Pair, ScalarPair, trace_product
from .group import Group, Side
from .target import Target

Factors = tuple[list[Tensor], list[Tensor]]
MARGIN = 2000.0
"""A squared error this many times above its own rounding error gives rho to three digits."""
ROUNDING = {"cpu": 2.0**-50, "cuda": 4e-6}
"""Relative error of a Gram entry: float64 on the CPU; on a GPU the kernels' promise for 16-bit and float32 inputs."""
SEEN = 2.5e-4
"""What may be missing in rho unseen: half a unit of its third digit, and half of that again for its own rounding."""
ZERO = 1e-14
"""A target this small beside its terms has cancelled to rounding: it is treated as zero."""


@dataclass(frozen=True, eq=False)
class Errors:
    """``||dW||^2`` and ``||dW - BA||^2`` of the modules of a group, (L,) float64 each."""

    energy: Tensor
    error: Tensor

    @property
    def rho(self) -> Tensor:
        """(L,) relative divergence; NaN where dW is zero."""
        return (self.error / self.energy).sqrt()


def combine(
    groups: Sequence[tuple[Group, AnyPair]], dtype: torch.dtype | None = None, backend: str = "auto"
) -> list[Factors]:
    """The factors of all modules in one read of the clients' factors: (list of B, list of A) per group."""
    targets = [t for group, _ in groups for t in group.targets]
    P = [c for group, pair in groups for c in _coefficients(group, pair, "B")]
    Q = [c for group, pair in groups for c in _coefficients(group, pair, "A")]
    B, A = kernels.factor_combine([t.B for t in targets], [t.A for t in targets], P, Q, dtype=dtype, backend=backend)
    sizes = [len(group.targets) for group, _ in groups]
    return list(zip(_split(B, sizes), _split(A, sizes), strict=True))


def _coefficients(group: Group, pair: AnyPair, side: Side) -> Sequence[Tensor]:
    """Of every module, for the factors without their scalings: blocks, or one scalar per member."""
    if isinstance(pair, ScalarPair):
        x = pair.p if side == "B" else pair.q
        return (x if group.unscaled else x * group.member_scale[side]).unbind()
    x = group.row_scale[side] * (pair.P if side == "B" else pair.Q)
    return (x if side == "B" else x.mT).unbind()


def _split(items: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    out, start = [], 0
    for size in sizes:
        out.append(items[start : start + size])
        start += size
    return out


def pair_errors(group: Group, pair: AnyPair) -> Errors:
    """Errors of a pair of coefficients, before any rounding to a dtype."""

    def factors(ids: list[int]) -> Factors:
        return combine([(group.subset(ids), Pair(pair.P[ids], pair.Q[ids], pair.status))], torch.float64)[0]

    if group.gram is None:
        return Errors(energies(group), _residual_squares(group.targets, factors(list(range(len(group.targets))))))
    error, doubtful, _ = _gram_errors(group, pair)
    return _redone(group, error, doubtful, factors)


def _gram_errors(group: Group, pair: AnyPair) -> tuple[Tensor, Tensor, Tensor]:
    """(L,) ``||dW - BA||^2`` from the Grams, where it may be rounding, and (L, 2) ``||B||^2``, ``||A||^2``."""
    C_B, C_A = group.apply("B", pair.P), group.apply("A", pair.Q)
    inner = (group.D * C_A * C_B).sum((-2, -1))
    S_B, S_A = pair.P.mT @ C_B, pair.Q.mT @ C_A
    error = energies(group) - 2 * inner + trace_product(S_B, S_A)
    squares = torch.stack([S.diagonal(dim1=-2, dim2=-1).sum(-1) for S in (S_B, S_A)], -1)
    return error, _doubtful(group, error, mass_of_pair(group, pair)), squares.clamp_min(0.0)


def _doubtful(group: Group, error: Tensor, mass: Tensor) -> Tensor:
    """(L,) where a squared error from Grams is not safely above its rounding; ``mass`` is what cancels in the pair."""
    return ~(error >= MARGIN * rounding(group) * (group.mass + mass) ** 2)


def mass_of_pair(group: Group, pair: AnyPair) -> Tensor:
    """(L,) what may cancel within the product of a pair: the sums of the norms of what its factors are made of."""
    bounds = group.row_norms if group.gram is not None else _member_norms(group)
    B, A = ((bounds[side].unsqueeze(-1) * X.abs()).sum(1) for side, X in (("B", pair.P), ("A", pair.Q)))
    return (B * A).sum(-1)


def mass_of_target(group: Group) -> Tensor:
    """(L,) what may cancel within dW, from above: in the implicit regime by the norms of whole factors."""
    if group.gram is not None:
        return group.mass
    norms, first = _member_norms(group), group.slot == 0
    return (group.D.squeeze(-1) * norms["B"] * norms["A"])[:, first].sum(-1)


def _member_norms(group: Group) -> dict[Side, Tensor]:
    """(L, R) per side: for every stacked row the norm of its member's whole scaled factor."""
    if "norms B" not in group.memo:
        for side in ("B", "A"):
            factors = [t.B if side == "B" else t.A for t in group.targets]
            norms = torch.stack(
                [
                    torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in members])
                    for members in factors
                ]
            )
            group.memo[f"norms {side}"] = norms[:, group.member] * group.row_scale[side].squeeze(-1).abs()
    return {"B": group.memo["norms B"], "A": group.memo["norms A"]}


def measured_errors(
    groups: Sequence[Group], pairs: Sequence[AnyPair], results: Sequence[Factors], backend: str = "auto"
) -> list[Errors]:
    """Errors of the factors as they are returned, rounding to their dtype included.

    Where that rounding cannot change three digits, from the Grams alone; else by one more read of the factors.
    """
    errors = [_exact_errors(g, p) for g, p in zip(groups, pairs, strict=True)]
    left = [i for i, e in enumerate(errors) if e is None and groups[i].gram is not None]
    crosses = iter(_products_with([groups[i] for i in left], [results[i] for i in left], backend) if left else ())
    for i, (group, factors) in enumerate(zip(groups, results, strict=True)):
        if group.gram is None:
            errors[i] = Errors(energies(group), _residual_squares(group.targets, factors))
        elif errors[i] is None:
            errors[i] = _measured(group, factors, [next(crosses) for _ in group.targets])
    return [e for e in errors if e is not None]


def _exact_errors(group: Group, pair: AnyPair) -> Errors | None:
    """Errors in exact arithmetic, or None where rounding of the factors could be seen in three digits of one."""
    own = torch.finfo(group.targets[0].dtype)
    if group.gram is None or group.device.type != "cpu" or pair.status == "exact" or own.eps > SEEN:
        return None
    evidence = pair.evidence
    if evidence is None and isinstance(pair, Pair):
        evidence = _evidence(group, pair)
    if evidence is None:
        return None
    # elements rounded to u = eps / 2 move the product by 2 u |B| |A|, if none of them over- or underflows
    norms, errors = evidence.norms.numpy(), evidence.error.numpy()
    unseen = own.eps * norms[:, 0] * norms[:, 1] <= SEEN * np.sqrt(errors)
    within = (norms < 0.01 * own.max) & (norms > own.tiny / own.eps)
    return Errors(energies(group), evidence.error) if unseen.all() and within.all() else None


def _evidence(group: Group, pair: AnyPair) -> Evidence | None:
    """The errors of a pair from the Grams and the norms of its factors; None where an error may be rounding."""
    error, doubtful, squares = _gram_errors(group, pair)
    return None if bool(doubtful.any()) else Evidence(error, squares.sqrt())


def _products_with(groups: Sequence[Group], results: Sequence[Factors], backend: str) -> list[tuple[Tensor, ...]]:
    """Per module the products of the clients' factors, and of the result's own, with the result's."""
    targets = [t for g in groups for t in g.targets]
    B, A = [b for f in results for b in f[0]], [a for f in results for a in f[1]]
    # the pair goes along as one more client: its own Grams come out below its products with the factors
    with_pair_B = [(*t.B, b) for t, b in zip(targets, B, strict=True)]
    with_pair_A = [(*t.A, a) for t, a in zip(targets, A, strict=True)]
    X_B, X_A = kernels.factor_cross(with_pair_B, with_pair_A, B, A, backend=backend)
    return list(zip(X_B or [], X_A or [], strict=True))


def _measured(group: Group, factors: Factors, rows: list[tuple[Tensor, ...]]) -> Errors:
    R = group.total_rank
    (X_B, S_B), (X_A, S_A) = ((X[:, :R], X[:, R:]) for X in (_stacked([row[i] for row in rows]) for i in range(2)))
    inner = (group.D * group.row_scale["B"] * group.row_scale["A"] * X_B * X_A).sum((-2, -1))
    norms_B, norms_A = (S.diagonal(dim1=-2, dim2=-1).sqrt() for S in (S_B, S_A))

    def pick(ids: list[int]) -> Factors:
        return [factors[0][i] for i in ids], [factors[1][i] for i in ids]

    error = energies(group) - 2 * inner + trace_product(S_B, S_A)
    return _redone(group, error, _doubtful(group, error, (norms_B * norms_A).sum(-1)), pick)


def _stacked(products: list[Tensor]) -> Tensor:
    """(L, R + r, r) of modules whose pairs differ in rank (``stack`` leaves out what has no weight), by zeros."""
    rank = max(x.shape[1] for x in products)
    return torch.stack([pad(x, (0, rank - x.shape[1], 0, rank - x.shape[1])) for x in products])


def _redone(group: Group, error: Tensor, doubtful: Tensor, factors: Callable[[list[int]], Factors]) -> Errors:
    """The errors, with the doubtful ones taken again without a difference of squares."""
    ids = doubtful.nonzero().flatten().tolist()
    if ids:
        error[ids] = _residual_squares([group.targets[i] for i in ids], factors(ids))
    return Errors(energies(group), error)


def rounding(group: Group) -> float:
    """The relative error of the group's Gram entries."""
    return ROUNDING.get(group.device.type, ROUNDING["cuda"])


def energies(group: Group) -> Tensor:
    """(L,) ``||dW||^2``, certified; exactly 0 where the terms cancel to rounding."""
    if "energies" not in group.memo:
        group.memo["energies"] = _exact_energies(group) if group.gram is None else _certified_energies(group)
    return group.memo["energies"]


def _certified_energies(group: Group) -> Tensor:
    energy, mass = group.gram_energy.clone(), group.mass
    ids = (energy < MARGIN * rounding(group) * mass**2).nonzero().flatten().tolist()
    if ids:
        exact = _squares([group.targets[i] for i in ids])
        energy[ids] = torch.where(exact <= (ZERO * mass[ids]) ** 2, 0.0, exact)
    return energy


def _exact_energies(group: Group) -> Tensor:
    """Without Grams: from the factors, and exactly 0 where the terms cancel to rounding, as with Grams."""
    exact = _squares(group.targets)
    return torch.where(exact <= (ZERO * mass_of_target(group)) ** 2, 0.0, exact)


def _squares(targets: Sequence[Target]) -> Tensor:
    c = [t.coefficients.to(t.device) for t in targets]
    return torch.stack(kernels.lowrank_norm([t.B for t in targets], [t.A for t in targets], c)).square()


def _residual_squares(targets: Sequence[Target], factors: Factors) -> Tensor:
    B = [(*t.B, b) for t, b in zip(targets, factors[0], strict=True)]
    A = [(*t.A, a) for t, a in zip(targets, factors[1], strict=True)]
    c = [torch.cat([t.coefficients, t.coefficients.new_tensor([-1.0])]).to(t.device) for t in targets]
    return torch.stack(kernels.lowrank_norm(B, A, c)).square()
