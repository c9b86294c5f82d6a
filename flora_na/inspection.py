"""What an operator wants to know before aggregating: every method's divergence, and how the clients lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .cohort import Cohort, make_cohort
from .diagnosis import Inspection, ModuleInspection
from .divergence import pair_errors
from .energies import energies
from .group import Group
from .grouping import make_groups
from .inner_products import group_gramians, module_gramians, spread
from .layer import AdapterLike
from .methods import COEFFICIENT_METHODS, check_method, solve, with_averages
from .portions import chunks
from .rank_choice import Rank, module_ranks, rank_curves
from .rank_collapse import rank_collapses
from .screening import Clip, Screening, check_screening, screen, screened
from .weights import Weights


@torch.no_grad()
def inspect(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    rank: Rank = None,
    missing: str = "error",
    clip: Clip = None,
    min_cosine: float | None = None,
    names: Sequence[str] | None = None,
    backend: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> Inspection:
    """Compare all methods on every module from one Gram pass, and the clients with each other.

    Args:
        adapters, weights, rank, missing, names, backend, progress: as in ``aggregate``.
        clip, min_cosine: as in ``aggregate``: the ladder is then that of the updates that pass, and the adapters are
            read twice. Norms, cosines and outlier scores are those of all clients, as they came.

    Returns:
        Divergences, error against rank, rank collapse, norms, cosines, outlier scores and warnings. Nothing is
        aggregated.

    Raises:
        ValueError: see ``aggregate``.
    """
    check_method("svd", rank, shared=False)
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    screening, known = None, None
    if check_screening(clip, min_cosine):
        known = dict(zip(cohort.modules, (g.cpu() for g in module_gramians(cohort, backend)), strict=True))
        screening = screen(sum_of(known), cohort.weights, cohort.names, clip, min_cosine)
    passed = cohort if screening is None else screened(cohort, screening)
    clients = _positions(cohort, screening)
    modules: dict[str, ModuleInspection] = {}
    for targets in chunks(passed, None, whole=False):
        found: dict[int, ModuleInspection] = {}
        for group, ids in make_groups(targets, backend):
            grams = None if known is None else [known[t.name] for t in group.targets]
            found.update(zip(ids, _inspect_group(group, rank, cohort, clients, grams), strict=True))
        for i, target in enumerate(targets):
            modules[target.name] = found[i]
            if progress is not None:
                progress(len(modules), len(passed.modules), target.name)
    whole = sum_of(known if known is not None else {name: m.gramian for name, m in modules.items()})
    return Inspection(cohort.names, cohort.weights, modules, whole, rank, screening)


def sum_of(gramians: Mapping[str, Tensor]) -> Tensor:
    """The inner products of the whole updates from those of their modules."""
    return torch.stack(list(gramians.values())).sum(0)


def _positions(cohort: Cohort, screening: Screening | None) -> dict[str, list[int]]:
    """Module by module, where the clients that take part stand in the whole cohort."""
    kept = [1.0] * len(cohort.names) if screening is None else screening.weights.tolist()
    return {m: [u for u in cohort.present(m) if kept[u] > 0] for m in cohort.modules}


def _inspect_group(
    group: Group, rank: Rank, cohort: Cohort, clients: Mapping[str, list[int]], grams: list[Tensor] | None
) -> list[ModuleInspection]:
    curves, total = rank_curves(group), energies(group)
    ranks = module_ranks(group, rank)
    rhos = _ladders(group, ranks)
    collapses = rank_collapses(group, total.tolist(), curves)
    if grams is None:
        own = group_gramians(group, group.backend).cpu()
        grams = [spread(g, cohort.present(t.name), len(cohort.names)) for g, t in zip(own, group.targets, strict=True)]
    return [
        ModuleInspection(
            rhos[i], ranks[i], norm, curves[i], grams[i], cohort.weights, _client_ranks(group, u, cohort), collapses[i]
        )
        for i, (norm, u) in enumerate(zip(total.sqrt().tolist(), (clients[t.name] for t in group.targets), strict=True))
    ]


def _ladders(group: Group, ranks: Sequence[int]) -> list[dict[str, float]]:
    """rho of every method, module by module."""
    out: list[dict[str, float]] = [{} for _ in ranks]
    for rank in sorted(set(ranks)):
        ids = [i for i, r in enumerate(ranks) if r == rank]
        part = group if len(ids) == len(ranks) else group.subset(ids)
        for method in COEFFICIENT_METHODS:
            [pair] = solve([part], method, rank)
            for i, rho in zip(ids, pair_errors(part, with_averages(part, pair)).rho, strict=True):
                out[i][method] = rho
    return out


def _client_ranks(group: Group, clients: Sequence[int], cohort: Cohort) -> list[int]:
    ranks = [0] * len(cohort.names)
    for u, rank in zip(clients, group.ranks, strict=True):
        ranks[u] = rank
    return ranks
