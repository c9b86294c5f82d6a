"""The findings of ``inspect``: per module, per client, and in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .methods import COEFFICIENT_METHODS
from .rank_choice import Rank, effective_rank
from .rank_collapse import RankCollapse
from .report import SCHEMA_VERSION, json_number, total
from .screening import Screening
from .weight_space import JUDGES, OUTLIER, cosines, mean_cosines, norms_of, outlier_scores


@dataclass(frozen=True, eq=False)
class ModuleInspection:
    """One module.

    Attributes:
        rho: relative divergence of every method at ``rank``; NaN where dW is zero.
        rank: of the compared pairs.
        norm: ``||dW||``.
        rank_curve: rho of the best pair of rank 1, 2, .., to the rank where it is zero; shorter where the total rank
            is too large for Grams; empty where dW is zero.
        gramian: (U, U) inner products of the unweighted updates, zeros for clients that lack the module.
        weights: (U,) float64 of the clients.
        client_ranks: rank of every client's update, 0 for clients that lack the module or are
            filtered out.
        rank_collapse: where the clients' ranks differ.
    """

    rho: Mapping[str, float]
    rank: int
    norm: float
    rank_curve: Sequence[float]
    gramian: Tensor
    weights: Tensor
    client_ranks: Sequence[int]
    rank_collapse: RankCollapse | None = None

    @property
    def client_norms(self) -> Tensor:
        """(U,) norms of the clients' updates."""
        return norms_of(self.gramian)

    @property
    def cosines(self) -> Tensor:
        """(U, U) cosines between the clients' updates; 0 with an update of norm zero."""
        return cosines(self.gramian)

    @property
    def cosines_to_mean(self) -> Tensor:
        """(U,) cosine of every client's update to the weighted mean update."""
        return mean_cosines(self.gramian, self.weights)

    @property
    def effective_rank(self) -> float:
        """Of dW (Roy and Vetterli 2007): ``exp`` of the entropy of its singular values; NaN where not all are known."""
        return effective_rank(self.rank_curve)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN becomes None."""
        return {
            "rho": {method: json_number(value) for method, value in self.rho.items()},
            "rank": self.rank,
            "norm": self.norm,
            "rank_curve": [json_number(value) for value in self.rank_curve],
            "effective_rank": json_number(self.effective_rank),
            "rank_collapse": self.rank_collapse and self.rank_collapse.to_dict(),
            "client_ranks": list(self.client_ranks),
            "client_norms": self.client_norms.tolist(),
            "client_cosines_to_mean": self.cosines_to_mean.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """All modules of a cohort, and the clients' whole updates in weight space.

    Attributes:
        names: the clients' labels.
        weights: (U,) float64, sum 1.
        modules: by name; with screening, the ladder is that of the updates that pass.
        gramian: (U, U) inner products of the clients' whole updates, before any screening. A module that a client
            lacks counts as a zero update.
        rank: as asked for.
        screening: what clipping and filtering would do, or None where neither was asked for.
    """

    names: tuple[str, ...]
    weights: Tensor
    modules: Mapping[str, ModuleInspection]
    gramian: Tensor
    rank: Rank = None
    screening: Screening | None = None

    @property
    def ladder(self) -> dict[str, float]:
        """rho of every method over all modules together."""
        parts = self.modules.values()
        return {method: total((m.rho[method], m.norm) for m in parts) for method in COEFFICIENT_METHODS}

    @property
    def rank_curve(self) -> list[float]:
        """rho of the best pairs of rank 1, 2, .. over all modules together; ends with the shortest curve that was cut.

        A module whose updates span fewer dimensions than a rank has no error at that rank.
        """
        modules = [m for m in self.modules.values() if m.norm > 0]
        longest = max((len(m.rank_curve) for m in modules), default=0)
        longest = min([longest, *(len(m.rank_curve) for m in modules if m.rank_curve[-1] > 0)])
        errors = [[*m.rank_curve, *[0.0] * (longest - len(m.rank_curve))] for m in modules]
        return [total((e[r], m.norm) for e, m in zip(errors, modules, strict=True)) for r in range(longest)]

    @property
    def client_norms(self) -> Tensor:
        """(U,) norms of the clients' whole updates."""
        return norms_of(self.gramian)

    @property
    def cosines(self) -> Tensor:
        """(U, U) cosines between the clients' whole updates; 0 with an update of norm zero."""
        return cosines(self.gramian)

    @property
    def cosines_to_mean(self) -> Tensor:
        """(U,) cosine of every client's whole update to the weighted mean update."""
        return mean_cosines(self.gramian, self.weights)

    @property
    def outlier_scores(self) -> Tensor:
        """(U,) robust z-scores of each update's distance to the mean of the others.

        ``(x - median) / (1.4826 * MAD)``: above 3 or so a client is far out. Zeros with fewer than three clients.
        """
        return outlier_scores(self.gramian)

    @property
    def rank_collapse(self) -> RankCollapse | None:
        """Of all modules whose clients' ranks differ, together."""
        return RankCollapse.total(m.rank_collapse for m in self.modules.values())

    @property
    def warnings(self) -> list[dict[str, str]]:
        """What an operator should look at: ``kind`` and ``message`` of each.

        Kinds: ``outlier`` (score above 3, from five clients on), ``opposed`` (cosine to the mean below 0),
        ``zero-update``, ``screening`` (most of the weight is dropped), and ``rank-collapse`` (see ``rank_collapse``).
        """
        columns = (x.tolist() for x in (self.client_norms, self.cosines_to_mean, self.outlier_scores))
        found = [
            {"kind": kind, "message": f"{name}: {text}"}
            for name, norm, cosine, score in zip(self.names, *columns, strict=True)
            for kind, text in _client_warnings(norm, cosine, score, len(self.names))
        ]
        return [*found, *self._screening_warnings(), *self._collapse_warnings()]

    def _screening_warnings(self) -> list[dict[str, str]]:
        if self.screening is None or not self.screening.doubtful:
            return []
        share = f"{self.screening.dropped_weight:.0%} of the clients' weight is dropped"
        return [{"kind": "screening", "message": f"{share}: clip as well, or lower min_cosine"}]

    def _collapse_warnings(self) -> list[dict[str, str]]:
        found = {name: c for name, m in self.modules.items() if (c := m.rank_collapse) is not None and c.collapsed}
        whole, names = RankCollapse.total(found.values()), list(found)
        if whole is None:
            return []
        message = (
            f"rank collapse in {len(names)} of {len(self.modules)} modules (the first: {names[0]}): beyond rank "
            f"{whole.smallest_rank} lies {whole.aggregate_share:.1%} of the aggregate's energy there, against "
            f"{whole.clients_share:.1%} of that of the clients of higher rank"
        )
        return [{"kind": "rank-collapse", "message": message}]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, by the schema of version 1. Keys may be added within a version, never changed or removed.

        Norms are Frobenius norms of updates, in the weights' units; NaN becomes None. ``schema_version``; ``rank`` as
        asked for (None, a number or ``auto:..``); ``ladder``: rho of every method over all modules, and
        ``rank_curve`` of the optimum at rank 1, 2, ..; ``clients``: by
        label ``weight``, ``norm``, ``cosine_to_mean``, ``outlier_score``, ``largest_rank``; ``client_cosines``: (U, U)
        in the order of ``clients``; ``rank_collapse`` (also per module): None where no ranks differ, else
        ``smallest_rank``, ``largest_rank``, ``aggregate_share``, ``clients_share``, ``retained``, ``collapsed``;
        ``screening``: None or ``Screening.to_dict``; ``warnings``: a list of ``kind`` and ``message``; ``modules``: by
        name ``rho`` by method, ``rank``, ``norm``, ``rank_curve`` (rho at rank 1, 2, ..), ``effective_rank``,
        ``rank_collapse``, and in the order of ``clients`` the ``client_ranks``, ``client_norms`` and
        ``client_cosines_to_mean``.
        """
        columns = (x.tolist() for x in (self.weights, self.client_norms, self.cosines_to_mean, self.outlier_scores))
        ranks = [max(of_one) for of_one in zip(*(m.client_ranks for m in self.modules.values()), strict=True)]
        labels = ("weight", "norm", "cosine_to_mean", "outlier_score", "largest_rank")
        whole = self.rank_collapse
        return {
            "schema_version": SCHEMA_VERSION,
            "rank": self.rank,
            "ladder": {method: json_number(value) for method, value in self.ladder.items()},
            "rank_curve": self.rank_curve,
            "clients": {
                name: dict(zip(labels, figures, strict=True))
                for name, *figures in zip(self.names, *columns, ranks, strict=True)
            },
            "client_cosines": self.cosines.tolist(),
            "rank_collapse": whole and whole.to_dict(),
            "screening": self.screening and self.screening.to_dict(),
            "warnings": self.warnings,
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
        }


def _client_warnings(norm: float, cosine: float, score: float, clients: int) -> list[tuple[str, str]]:
    found = []
    if norm == 0:
        found.append(("zero-update", "the update is zero"))
    if cosine < 0:
        found.append(("opposed", f"points away from the mean update (cosine {cosine:.2f})"))
    if score > OUTLIER and clients >= JUDGES:
        found.append(("outlier", f"far from the other clients (outlier score {score:.1f})"))
    return found
