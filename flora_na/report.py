"""The evidence that goes with an aggregate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .estimation import Estimate
from .screening import Screening

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class ModuleReport:
    """One module of an aggregate.

    Attributes:
        rho: relative divergence of the factors as returned; NaN where dW is zero.
        norm: ``||dW||`` (Frobenius).
        rank: of the returned pair.
        status: see ``Estimate.status``.
        sweeps: alternating sweeps used.
    """

    rho: float
    norm: float
    rank: int
    status: str
    sweeps: int
    _fedavg: Callable[[], float]
    _optimal: Callable[[], float]

    @staticmethod
    def of(estimate: Estimate) -> ModuleReport:
        """The report of one estimate; its yardsticks stay lazy."""
        return ModuleReport(
            estimate.rho,
            estimate.norm,
            estimate.rank,
            estimate.status,
            estimate.sweeps,
            lambda: estimate.rho_fedavg,
            lambda: estimate.rho_optimal,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with its yardsticks as numbers, without the Grams and factors behind them."""
        figures = (self.rho, self.norm, self.rank, self.status, self.sweeps)
        return ModuleReport, (*figures, partial(float, self.rho_fedavg), partial(float, self.rho_optimal))

    def settled(self) -> ModuleReport:
        """The same with its yardsticks computed, so that nothing of the module's Grams is kept."""
        return replace(self, _fedavg=partial(float, self.rho_fedavg), _optimal=partial(float, self.rho_optimal))

    @property
    def rho_fedavg(self) -> float:
        """rho of the averaged factors, cut to this rank where it is below theirs; computed when first asked for."""
        return self._fedavg()

    @property
    def rho_optimal(self) -> float:
        """rho of the best pair of this rank; computed when first asked for."""
        return self._optimal()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes None."""
        return {
            "rho": json_number(self.rho),
            "rho_fedavg": json_number(self.rho_fedavg),
            "rho_optimal": json_number(self.rho_optimal),
            "norm": json_number(self.norm),
            "rank": self.rank,
            "status": self.status,
            "sweeps": self.sweeps,
        }


@dataclass(frozen=True, eq=False)
class Report:
    """All modules of an aggregate; totals are over all modules together: ``sqrt(sum ||dW - BA||^2 / sum ||dW||^2)``.

    Attributes:
        method: as asked for.
        clients: the weights of the clients that were aggregated, by label.
        modules: by name.
        screening: what clipping and filtering did before, or None where neither was asked for. The figures are then
            those of the updates that passed.
    """

    method: str
    clients: Mapping[str, float]
    modules: Mapping[str, ModuleReport]
    screening: Screening | None = None

    @property
    def rho(self) -> float:
        """Of the aggregate as returned."""
        return total((m.rho, m.norm) for m in self.modules.values())

    @property
    def rho_fedavg(self) -> float:
        """Of the averaged factors, cut to the ranks of the pairs where these are below theirs."""
        return total((m.rho_fedavg, m.norm) for m in self.modules.values())

    @property
    def rho_optimal(self) -> float:
        """Of the best pairs of the same ranks."""
        return total((m.rho_optimal, m.norm) for m in self.modules.values())

    def settled(self) -> Report:
        """The same with all yardsticks computed."""
        return replace(self, modules={name: module.settled() for name, module in self.modules.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, by the schema of version 1; NaN becomes None.

        ``schema_version``, ``method``; ``rho``, ``rho_fedavg`` and ``rho_optimal`` over all modules; ``clients``:
        weight by label; ``screening``: None or ``Screening.to_dict``; ``modules``: ``ModuleReport.to_dict`` by name.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "rho": json_number(self.rho),
            "rho_fedavg": json_number(self.rho_fedavg),
            "rho_optimal": json_number(self.rho_optimal),
            "clients": dict(self.clients),
            "screening": self.screening and self.screening.to_dict(),
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
        }


def total(parts: Iterable[tuple[float, float]]) -> float:
    """rho over several modules from pairs (rho, norm); modules of norm zero count for nothing, all zero gives NaN."""
    kept = [(rho, norm) for rho, norm in parts if norm > 0]
    scale = max((norm for _, norm in kept), default=0.0)
    if scale == 0:
        return math.nan
    error = sum((rho * (norm / scale)) ** 2 for rho, norm in kept)
    return math.sqrt(error / sum((norm / scale) ** 2 for _, norm in kept))


def json_number(value: float) -> float | None:
    """The value, or None for NaN and Inf, which JSON does not have."""
    return value if math.isfinite(value) else None
