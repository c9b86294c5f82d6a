"""The squared errors behind ``rho = ||dW - BA|| / ||dW||``, certified to three digits.

From Grams a squared error is a difference of nearly equal numbers when rho is small. So every value is held against
the rounding error of what was subtracted; where three digits are not safe, the norm is taken again from the factors
of the residual in float64 (``kernels.lowrank_norm``), without any difference of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedgram import kernels

from .coefficients import AnyPair, Evidence, Pair, trace_product
from .combination import combine, combine_with_products, known_averages
from .energies import MARGIN, energies, mass_of_pair, rounding
from .group import Factors, Group
from .grouping import stacked
from .target import Target

SEEN = 2.5e-4
"""What may be missing in rho unseen: half a unit of its third digit, and half of that again for its own rounding."""


@dataclass(frozen=True, eq=False)
class Errors:
    """``||dW||^2`` and ``||dW - BA||^2`` of the modules of a group, (L,) float64 each."""

    energy: Tensor
    error: Tensor

    @cached_property
    def rho(self) -> list[float]:
        """L numbers, relative divergence; NaN where dW is zero."""
        return torch.where(self.energy > 0, self.error / self.energy, torch.nan).sqrt().tolist()


def combine_measured(
    groups: Sequence[tuple[Group, AnyPair]], backend: str = "auto"
) -> tuple[list[Factors], list[Errors]]:
    """The factors of all modules, and the errors of the factors as they are returned, rounding to their dtype included.

    Where that rounding cannot change three digits the errors come from the Grams alone; else from the products of
    what is returned with the clients' factors, which are taken in the same read where they can be.
    """
    known = [_exact_errors(group, pair) or _average_errors(group, pair) for group, pair in groups]
    beside = [error is None and group.gram is not None for error, (group, _) in zip(known, groups, strict=True)]
    alone = iter(combine([pair for pair, measured in zip(groups, beside, strict=True) if not measured], None, backend))
    with_products = iter(combine_with_products(list(compress(groups, beside)), backend))
    factors, errors = [], []
    for (group, _), error, measured in zip(groups, known, beside, strict=True):
        if measured:
            found, products = next(with_products)
            error = _measured(group, found, *products)
        else:
            found = next(alone)
        factors.append(found)
        errors.append(error or _exactly_measured(group, found))
    return factors, errors


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


def measured_errors(groups: Sequence[Group], results: Sequence[Factors], backend: str = "auto") -> list[Errors]:
    """Errors of given factors, by one more read of the clients'."""
    found = []
    for group, factors in zip(groups, results, strict=True):
        if group.gram is None:
            found.append(_exactly_measured(group, factors))
        else:
            found.append(_measured(group, factors, *_products_of(group, factors, backend)))
    return found


def _exactly_measured(group: Group, factors: Factors) -> Errors:
    return Errors(energies(group), _residual_squares(group.targets, factors))


def shows(dtype: torch.dtype) -> bool:
    """Whether rounding factors to this type can change three digits of a divergence."""
    return torch.finfo(dtype).eps > SEEN


def _exact_errors(group: Group, pair: AnyPair) -> Errors | None:
    """Errors in exact arithmetic, or None where rounding of the factors could be seen in three digits of one."""
    dtype = group.targets[0].dtype
    if group.gram is None or group.device.type != "cpu" or pair.status == "exact" or shows(dtype):
        return None
    evidence = pair.evidence
    if evidence is None and isinstance(pair, Pair):
        evidence = _evidence(group, pair)
    if evidence is None:
        return None
    # elements rounded to u = eps / 2 move the product by 2 u |B| |A|, if none of them over- or underflows
    own, norms, errors = torch.finfo(dtype), evidence.norms.numpy(), evidence.error.numpy()
    unseen = own.eps * norms[:, 0] * norms[:, 1] <= SEEN * np.sqrt(errors)
    within = (norms < 0.01 * own.max) & (norms > own.tiny / own.eps)
    return Errors(energies(group), evidence.error) if unseen.all() and within.all() else None


def _evidence(group: Group, pair: AnyPair) -> Evidence | None:
    """The errors of a pair from the Grams and the norms of its factors; None where an error may be rounding."""
    error, doubtful, squares = _gram_errors(group, pair)
    return None if bool(doubtful.any()) else Evidence(error, squares.sqrt())


def _products_of(group: Group, factors: Factors, backend: str) -> Factors:
    """Per module the products of the clients' factors, and of the result's own, with the result's."""
    beside_B = [(*t.B, b) for t, b in zip(group.targets, factors[0], strict=True)]
    beside_A = [(*t.A, a) for t, a in zip(group.targets, factors[1], strict=True)]
    X_B, X_A = kernels.factor_cross(beside_B, beside_A, *factors, precise=True, backend=backend)
    return X_B or [], X_A or []


def _average_errors(group: Group, pair: AnyPair) -> Errors | None:
    """Errors of averages that were measured in the read that took the Grams, or None."""
    if group.average is None or group.average.products is None or (factors := known_averages(group, pair)) is None:
        return None
    return _measured(group, factors, *group.average.products)


def _measured(
    group: Group, factors: Factors, products_B: Tensor | list[Tensor], products_A: Tensor | list[Tensor]
) -> Errors:
    """From the products (L, R + r, r) of the members' factors, and of these, with these."""
    R = group.total_rank
    products = ((X if isinstance(X, Tensor) else _in_one(X)).to(group.device) for X in (products_B, products_A))
    (X_B, S_B), (X_A, S_A) = ((X[:, :R], X[:, R:]) for X in products)
    inner = (group.D * group.row_scale["B"] * group.row_scale["A"] * X_B * X_A).sum((-2, -1))
    norms_B, norms_A = (S.diagonal(dim1=-2, dim2=-1).sqrt() for S in (S_B, S_A))

    def pick(ids: list[int]) -> Factors:
        return [factors[0][i] for i in ids], [factors[1][i] for i in ids]

    error = energies(group) - 2 * inner + trace_product(S_B, S_A)
    return _redone(group, error, _doubtful(group, error, (norms_B * norms_A).sum(-1)), pick)


def _in_one(products: list[Tensor]) -> Tensor:
    """(L, R + r, r) of modules whose pairs differ in rank (``stack`` leaves out what has no weight), by zeros."""
    rank = max(x.shape[1] for x in products)
    if all(x.shape[1] == rank for x in products):
        return stacked(products)
    return torch.stack([pad(x, (0, rank - x.shape[1], 0, rank - x.shape[1])) for x in products])


def _redone(group: Group, error: Tensor, doubtful: Tensor, factors: Callable[[list[int]], Factors]) -> Errors:
    """The errors, with the doubtful ones taken again without a difference of squares."""
    ids = doubtful.nonzero().flatten().tolist()
    if ids:
        error[ids] = _residual_squares([group.targets[i] for i in ids], factors(ids)).to(error.device)
    return Errors(energies(group), error)


def _residual_squares(targets: Sequence[Target], factors: Factors) -> Tensor:
    B = [(*t.B, b) for t, b in zip(targets, factors[0], strict=True)]
    A = [(*t.A, a) for t, a in zip(targets, factors[1], strict=True)]
    c = [torch.cat([t.coefficients, t.coefficients.new_tensor([-1.0])]).to(t.device) for t in targets]
    return torch.stack(kernels.lowrank_norm(B, A, c)).square()
