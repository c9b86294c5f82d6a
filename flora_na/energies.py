"""``||dW||^2`` of the modules of a group, what may cancel within it, and what rounding of the Grams makes of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgram import kernels

from .coefficients import AnyPair
from .group import Group
from .members import SIDES, Side
from .target import Target

MARGIN = 2000.0
"""A squared error this many times above its own rounding error gives rho to three digits."""
ROUNDING = {"float64": 2.0**-50, "float32": 4e-6}
"""Relative error of a Gram entry: of float64 products, and what the kernels promise without."""
ZERO = 1e-14
"""A target this small beside its terms has cancelled to rounding: it is treated as zero."""


def energies(group: Group) -> Tensor:
    """(L,) ``||dW||^2``, certified; exactly 0 where the terms cancel to rounding."""
    if group.memo.energies is None:
        group.memo.energies = _exact_energies(group) if group.gram is None else _certified_energies(group)
    return group.memo.energies


def _certified_energies(group: Group) -> Tensor:
    energy, mass = group.gram_energy.clone(), group.mass
    ids = (energy < MARGIN * rounding(group) * mass**2).nonzero().flatten().tolist()
    if ids:
        exact = _squares([group.targets[i] for i in ids]).to(energy.device)
        energy[ids] = torch.where(exact <= (ZERO * mass[ids]) ** 2, 0.0, exact)
    return energy


def _exact_energies(group: Group) -> Tensor:
    """Without Grams: from the factors, and exactly 0 where the terms cancel to rounding, as with Grams."""
    exact = _squares(group.targets)
    return torch.where(exact <= (ZERO * mass_of_target(group)) ** 2, 0.0, exact)


def _squares(targets: Sequence[Target]) -> Tensor:
    c = [t.coefficients.to(t.device) for t in targets]
    return torch.stack(kernels.lowrank_norm([t.B for t in targets], [t.A for t in targets], c)).square()


def rounding(group: Group) -> float:
    """The relative error of the group's Gram entries, or of the products with those that are not formed."""
    return ROUNDING["float64" if group.gram is not None or group.device.type == "cpu" else "float32"]


def mass_of_target(group: Group) -> Tensor:
    """(L,) what may cancel within dW, from above: in the implicit regime by the norms of whole factors."""
    if group.gram is not None:
        return group.mass
    norms, first = _member_norms(group), group.slot == 0
    return (group.D.squeeze(-1) * norms["B"] * norms["A"])[:, first].sum(-1)


def mass_of_pair(group: Group, pair: AnyPair) -> Tensor:
    """(L,) what may cancel within the product of a pair: the sums of the norms of what its factors are made of."""
    B, A = column_masses(group, pair)
    return (B * A).sum(-1)


def column_masses(group: Group, pair: AnyPair) -> tuple[Tensor, Tensor]:
    """(L, r) for B and A: what every column of B, and row of A, is made of, as the sum of the norms of its terms."""
    norms = factor_norms(group)
    B, A = norms["B"].unsqueeze(-1) * pair.P.abs(), norms["A"].unsqueeze(-1) * pair.Q.abs()
    return B.sum(1), A.sum(1)


def factor_norms(group: Group) -> dict[Side, Tensor]:
    """(L, R) per side, of every stacked column of B and row of A; in the implicit regime bounds of them."""
    return group.row_norms if group.gram is not None else _member_norms(group)


def _member_norms(group: Group) -> dict[Side, Tensor]:
    """(L, R) per side: for every stacked row the norm of its member's whole scaled factor."""
    if group.memo.member_norms is None:
        found: dict[Side, Tensor] = {}
        for side in SIDES:
            factors = [t.B if side == "B" else t.A for t in group.targets]
            norms = torch.stack(
                [
                    torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in members])
                    for members in factors
                ]
            )
            found[side] = norms[:, group.member] * group.row_scale[side].squeeze(-1).abs()
        group.memo.member_norms = found
    return group.memo.member_norms
