"""What an operator wants to know before aggregating: every method's divergence, and how the clients lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .aggregation import Progress, chunks
from .cohort import Cohort, make_cohort
from .divergence import energies, pair_errors
from .group import Group, make_groups
from .inner_products import group_gramians, spread
from .layer import AdapterLike
from .methods import COEFFICIENT_METHODS, solve, with_averages, zero_targets
from .report import finite, total
from .svd import spectrum
from .weights import Weights


@dataclass(frozen=True, eq=False)
class ModuleInspection:
    """One module.

    Attributes:
        rho: relative divergence of every method at ``rank``; NaN where dW is zero.
        rank: of the compared pairs.
        norm: ``||dW||``.
        rank_curve: rho of the best pair of rank 1, 2, ..; empty where the total rank is too large for Grams.
        gramian: (U, U) inner products of the unweighted updates, zeros for clients that lack the module.
    """

    rho: Mapping[str, float]
    rank: int
    norm: float
    rank_curve: Sequence[float]
    gramian: Tensor

    @property
    def client_norms(self) -> Tensor:
        """(U,) norms of the clients' updates."""
        return self.gramian.diagonal().clamp_min(0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """(U, U) cosines between the clients' updates; 0 with an update of norm zero."""
        return cosines(self.gramian)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes None."""
        return {
            "rho": {method: finite(value) for method, value in self.rho.items()},
            "rank": self.rank,
            "norm": self.norm,
            "rank_curve": [finite(value) for value in self.rank_curve],
            "client_norms": self.client_norms.tolist(),
            "cosines": self.cosines.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """All modules of a cohort, and the clients' whole updates in weight space.

    Attributes:
        names: the clients' labels.
        weights: (U,) float64, sum 1.
        modules: by name.
        gramian: (U, U) inner products of the clients' whole updates.
    """

    names: tuple[str, ...]
    weights: Tensor
    modules: Mapping[str, ModuleInspection]
    gramian: Tensor

    @property
    def ladder(self) -> dict[str, float]:
        """rho of every method over all modules together."""
        parts = self.modules.values()
        return {method: total((m.rho[method], m.norm) for m in parts) for method in COEFFICIENT_METHODS}

    @property
    def client_norms(self) -> Tensor:
        """(U,) norms of the clients' whole updates."""
        return self.gramian.diagonal().clamp_min(0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """(U,) cosine of every client's update to the weighted mean update."""
        inner = self.gramian @ self.weights
        mean = (self.weights @ inner).clamp_min(0).sqrt()
        return _ratio(inner, self.client_norms * mean)

    @property
    def outlier_scores(self) -> Tensor:
        """(U,) robust z-scores of each update's distance to the mean of the others.

        ``(x - median) / (1.4826 * MAD)``: above 3 or so a client is far out. Zeros with fewer than three clients.
        """
        return outlier_scores(self.gramian)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes None."""
        scores, norms, angles = (x.tolist() for x in (self.outlier_scores, self.client_norms, self.cosines))
        return {
            "ladder": {method: finite(value) for method, value in self.ladder.items()},
            "clients": {
                name: {"weight": w, "norm": norm, "cosine_to_mean": angle, "outlier_score": score}
                for name, w, norm, angle, score in zip(
                    self.names, self.weights.tolist(), norms, angles, scores, strict=True
                )
            },
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
        }


@torch.no_grad()
def inspect(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    rank: int | None = None,
    missing: str = "error",
    names: Sequence[str] | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Inspection:
    """Compare all methods on every module from one Gram pass, and the clients with each other.

    Args:
        adapters, weights, rank, missing, names, backend, progress: as in ``aggregate``.

    Returns:
        Divergences, error against rank, norms, cosines and outlier scores. Nothing is aggregated.

    Raises:
        ValueError: see ``aggregate``.
    """
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    modules: dict[str, ModuleInspection] = {}
    for targets in chunks(cohort, None, whole=False):
        found: dict[int, ModuleInspection] = {}
        for group, ids in make_groups(targets, backend):
            found.update(zip(ids, _inspect_group(group, rank, cohort, backend), strict=True))
        for i, target in enumerate(targets):
            modules[target.name] = found[i]
            if progress is not None:
                progress(len(modules), len(cohort.modules), target.name)
    gramian = sum(m.gramian for m in modules.values())
    assert isinstance(gramian, Tensor)
    return Inspection(cohort.names, cohort.weights, modules, gramian)


def _inspect_group(group: Group, rank: int | None, cohort: Cohort, backend: str) -> list[ModuleInspection]:
    rhos = {}
    for method in COEFFICIENT_METHODS:
        [pair] = solve([group], method, rank)
        pair = with_averages(group, pair, zero_targets(group, pair))
        rhos[method] = pair_errors(group, pair).rho.tolist()
    curves, norms = _rank_curves(group), energies(group).sqrt().tolist()
    gramians = group_gramians(group, backend).cpu()
    return [
        ModuleInspection(
            {method: values[i] for method, values in rhos.items()},
            group.rank if rank is None else rank,
            norms[i],
            curves[i],
            spread(gramians[i], cohort.present(target.name), len(cohort.adapters)),
        )
        for i, target in enumerate(group.targets)
    ]


def _rank_curves(group: Group) -> list[list[float]]:
    """rho of the optimum at rank 1 .. R; resolved down to about 1e-8, where float64 Grams end."""
    if group.gram is None:
        return [[] for _ in group.targets]
    energy = spectrum(group).energies
    tails = energy.flip(-1).cumsum(-1).flip(-1)
    curve = (torch.nn.functional.pad(tails[:, 1:], (0, 1)) / tails[:, :1]).sqrt()
    return curve.tolist()


def cosines(gramian: Tensor) -> Tensor:
    """(U, U) cosines from inner products; 0 where a norm is zero."""
    norms = gramian.diagonal().clamp_min(0).sqrt()
    return _ratio(gramian, norms.unsqueeze(1) * norms)


def outlier_scores(gramian: Tensor) -> Tensor:
    """(U,) robust z-scores of the distance of every update to the unweighted mean of the others."""
    clients = gramian.shape[0]
    if clients < 3:
        return torch.zeros(clients, dtype=torch.float64)
    others = (1.0 - torch.eye(clients, dtype=torch.float64)) / (clients - 1)
    offset = torch.eye(clients, dtype=torch.float64) - others
    distance = (offset @ gramian @ offset.mT).diagonal().clamp_min(0).sqrt()
    median = distance.quantile(0.5)
    deviation = 1.4826 * (distance - median).abs().quantile(0.5)
    return _ratio(distance - median, deviation.clamp_min(1e-9 * median))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
