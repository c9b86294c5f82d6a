"""Whole adapters: estimate every module, average what was trained beside the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cohort import Cohort, average_extras, check_anchor, extra_roles, make_cohort, read_layer
from .estimation import Estimate, estimate_targets
from .inner_products import screen_cohort
from .layer import Adapter, AdapterLike, LoraLayer
from .methods import check_method
from .portions import chunks
from .rank_choice import Rank
from .report import ModuleReport, Report
from .screening import Clip, Screening
from .target import Target
from .weights import Weights

Progress = Callable[[int, int, str], None]
LAZY_RANK = 256
"""Up to this total rank a report keeps the Grams, and factors that lie in memory anyway, for its yardsticks; else they
are computed at once."""


@dataclass(frozen=True, eq=False)
class Aggregation:
    """An aggregated adapter, its factored residual where asked for, and its evidence."""

    adapter: Adapter
    residual: Adapter | None
    report: Report


@torch.no_grad()
def aggregate(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    method: str = "als",
    rank: Rank = None,
    shared: bool = False,
    anchor: AdapterLike | None = None,
    align_to: AdapterLike | None = None,
    missing: str = "error",
    clip: Clip = None,
    min_cosine: float | None = None,
    residual: bool = False,
    backend: str = "auto",
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
) -> Aggregation:
    """Aggregate the clients' adapters into one (arXiv:2509.26399; ``estimate`` says what each method does).

    Args:
        adapters: one Adapter, or mapping module name -> LoraLayer, per client. Mappings may be lazy: modules are read
            a few at a time.
        weights: one per client (its sample count, say), normalised to sum 1; uniform by default.
        method: ``fedavg``, ``flora-na``, ``als``, ``svd`` or ``stack``. The update of ``als``, ``svd`` and ``stack``
            depends on the clients' products only; that of ``fedavg`` on their gauge too (rescaling ``c B, A / c`` or
            rotating the factors), that of ``flora-na`` on rotations, and on rescaling where the averages that it starts
            from then lead to another local optimum.
        rank: of the result; None is, per module, the largest rank among clients and anchor (without the zeros that an
            anchor is padded with); ``"auto:0.99"`` the smallest rank whose best pair keeps that share of ``||dW||^2``,
            which may be above or below the clients'.
        shared: ``flora-na`` with one pair of coefficients for all modules, as the authors' code has it.
        anchor: last round's global adapter; see ``estimate``. What it has and no client has is not in the result.
        align_to: an earlier global adapter to rotate the result towards (als and svd only); every module of the result
            has its rank at least, unless ``rank`` is a number: so a round of clients of lower ranks can be rotated too.
        missing: a module that a client lacks is an ``error``; or the others' weights are scaled to sum 1
            (``renormalize``); or its update counts as ``zero``. ``cohort.MISSING`` defines the targets, and what
            becomes of full tensors.
        clip: scale down updates whose norm over all modules is above this, or above a multiple of the median norm
            (``"2x"``); ``flora_na.screening`` defines it. The adapters are then read twice.
        min_cosine: leave out clients whose (clipped) update has a smaller cosine to the mean of those that remain.
        residual: also return ``dW - BA`` as an adapter of rank R + r (float32 or wider).
        backend: ``auto``, ``triton``, ``native`` or ``torch``.
        progress: called with (modules done, modules in all, module name).
        names: the clients' labels in errors and reports; equal ones are numbered: ``a``, ``a (2)``.

    Returns:
        The adapter (every layer with scaling 1, in the dtype that all clients' dtypes, and the anchor's, promote to:
        float32 for float16 with bfloat16), the residual or None, and the report.

    Raises:
        ValueError: see ``estimate``; the message names the module and the client.
    """
    check_method(method, rank, shared)
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    cohort, screening = screen_cohort(cohort, clip, min_cosine, backend)
    return aggregate_cohort(
        cohort,
        screening,
        method=method,
        rank=rank,
        shared=shared,
        anchor=anchor,
        align_to=align_to,
        residual=residual,
        backend=backend,
        progress=progress,
    )


@torch.no_grad()
def aggregate_cohort(
    cohort: Cohort,
    screening: Screening | None = None,
    *,
    method: str = "als",
    rank: Rank = None,
    shared: bool = False,
    anchor: AdapterLike | None = None,
    align_to: AdapterLike | None = None,
    residual: bool = False,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Aggregation:
    """``aggregate`` for clients that are checked, and screened where that was asked for."""
    check_method(method, rank, shared)
    if shared and any(len(cohort.present(m)) < len(cohort.adapters) for m in cohort.modules):
        raise ValueError("shared: needs every module in every client")
    extras = average_extras(cohort)
    base = check_anchor(anchor, cohort, "anchor")
    previous = check_anchor(align_to, cohort, "align_to")
    layers: dict[str, LoraLayer] = {}
    rests: dict[str, LoraLayer] = {}
    reports: dict[str, ModuleReport] = {}
    for targets in chunks(cohort, base, whole=shared):
        estimates = estimate_targets(
            targets, method=method, rank=rank, shared=shared, align_to=_previous(targets, previous), backend=backend
        )
        for target, e in zip(targets, estimates, strict=True):
            layers[target.name] = LoraLayer(A=e.A, B=e.B)
            if residual:
                rest_B, rest_A = e.residual()
                rests[target.name] = LoraLayer(A=rest_A, B=rest_B)
            reports[target.name] = module_report(e, target, cohort)
            if progress is not None:
                progress(len(layers), len(cohort.modules), target.name)
    return Aggregation(
        Adapter(layers, extras, cohort.config, extra_roles(cohort)),
        Adapter(rests, {}, cohort.config) if residual else None,
        Report(method, dict(zip(cohort.names, cohort.weights.tolist(), strict=True)), reports, screening),
    )


def module_report(estimate: Estimate, target: Target, cohort: Cohort) -> ModuleReport:
    """The report of one estimate; it keeps Grams and factors for its yardsticks unless that would take memory."""
    report = ModuleReport.of(estimate)
    return report if cohort.held and sum(target.ranks) <= LAZY_RANK else report.settled()


def _previous(targets: list[Target], adapter: Adapter | None) -> list[tuple[Tensor, Tensor]] | None:
    """Earlier factors with the scaling split over both, as the result has it."""
    if adapter is None:
        return None
    layers = [read_layer(adapter, t.name, "align_to").trimmed() for t in targets]
    roots = [abs(layer.scaling) ** 0.5 for layer in layers]
    return [
        (layer.B * (root if layer.scaling > 0 else -root), layer.A * root)
        for layer, root in zip(layers, roots, strict=True)
    ]
