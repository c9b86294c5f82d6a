"""The clients' whole updates seen as vectors in weight space: all inner products from the factor Grams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgram import kernels

from .cohort import Cohort, make_cohort
from .energies import ROUNDING
from .finite import check_finite
from .group import Group
from .grouping import make_groups
from .layer import AdapterLike
from .portions import chunks
from .screening import Clip, Screening, check_screening, screen, screened
from .weights import Weights, normalise_weights


@torch.no_grad()
def client_gramian(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    missing: str = "error",
    backend: str = "auto",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Inner products of the clients' whole updates: ``G_uv = sum over modules of <s_u B_u A_u, s_v B_v A_v>``.

    Per module it is ``s_u s_v tr(G_B[u,v] G_A[v,u])`` (docs/math.md 1.3): norms, cosines and spatial matching in weight
    space, without a dense update.

    Args:
        adapters: one per client.
        weights: with them, every update is multiplied by its normalised weight first; by default none is.
        missing: as in ``aggregate``; ``renormalize`` and ``zero`` both count a missing module as a zero update here.
        backend: ``auto``, ``triton``, ``native`` or ``torch``.
        names: the clients' labels in errors.

    Returns:
        (U, U) float64 on the factors' device, symmetric positive semidefinite to rounding.

    Raises:
        ValueError: see ``aggregate``.
    """
    cohort = make_cohort(adapters, None, names=names, missing="zero" if missing == "renormalize" else missing)
    total = sum(module_gramians(cohort, backend))
    assert isinstance(total, Tensor)
    layers = (layer for adapter in cohort.adapters for layer in adapter.modules.values())
    total = total.to(next(layers).A.device)
    if weights is None:
        return total
    w = normalise_weights(weights, len(adapters)).to(total.device)
    return total * w * w.unsqueeze(1)


def screen_cohort(
    cohort: Cohort, clip: Clip, min_cosine: float | None, backend: str = "auto"
) -> tuple[Cohort, Screening | None]:
    """Clip and filter the clients by their whole updates (see ``screening``); reads every factor once.

    Returns:
        The cohort to aggregate and what was done; the cohort itself and None where neither is asked for.
    """
    if not check_screening(clip, min_cosine):
        return cohort, None
    gramian = torch.stack([g.cpu() for g in module_gramians(cohort, backend)]).sum(0)
    found = screen(gramian, cohort.weights, cohort.names, clip, min_cosine)
    return screened(cohort, found), found


def module_gramians(cohort: Cohort, backend: str) -> list[Tensor]:
    """(U, U) inner products of the unweighted updates, one matrix per module."""
    out: list[Tensor] = []
    for targets in chunks(cohort, None, whole=False):
        placed: dict[int, Tensor] = {}
        for group, ids in make_groups(targets, backend):
            for i, gramian in zip(ids, group_gramians(group, backend), strict=True):
                placed[i] = spread(gramian, cohort.present(targets[i].name), len(cohort.adapters))
        out.extend(placed[i] for i in range(len(targets)))
    return out


def group_gramians(group: Group, backend: str = "auto") -> Tensor:
    """(L, U, U) inner products of the clients' unweighted updates in every module of a group.

    An update that has cancelled to rounding (its factors beside those that training started from) is exactly zero.
    """
    if group.gram is not None:
        terms = group.gram["B"] * group.gram["A"]
    else:
        for target in group.targets:
            check_finite(target)
        B, A = kernels.factor_gram(group.factors.B, group.factors.A, precise=True, backend=backend)
        scale = group.row_scale["B"] * group.row_scale["A"]
        terms = scale * torch.stack(B) * torch.stack(A) * scale.mT
    found = group.member_blocks(terms)
    mass = group.sum_members(terms.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt())
    real = found.diagonal(dim1=-2, dim2=-1) > ROUNDING["float64"] * mass.square()
    return torch.where(real.unsqueeze(-1) & real.unsqueeze(-2), found, 0.0)


def spread(gramian: Tensor, present: list[int], clients: int) -> Tensor:
    """A module's matrix among the clients that have it, with zeros for those that lack it."""
    if len(present) == clients:
        return gramian
    out = gramian.new_zeros(clients, clients)
    rows = torch.tensor(present, device=gramian.device)
    out[rows.unsqueeze(1), rows] = gramian
    return out
