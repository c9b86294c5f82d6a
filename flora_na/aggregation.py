"""Whole adapters: estimate every module, average what was trained beside the factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cohort import Cohort, average_extras, check_anchor, make_cohort
from .estimation import Estimate, estimate_targets
from .layer import Adapter, AdapterLike, LoraLayer
from .methods import check_method
from .report import ModuleReport, Report
from .target import Target
from .weights import Weights

Progress = Callable[[int, int, str], None]
CHUNK_BYTES = 64 << 20
"""Factors read before they are worked on, on the CPU: bounds the memory of lazily read adapters."""
CHUNK_BYTES_GPU = 8 << 30
LAZY_RANK = 256
"""Up to this total rank a report keeps the Grams for its yardsticks; above it they are computed at once."""


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
    rank: int | None = None,
    shared: bool = False,
    anchor: AdapterLike | None = None,
    align_to: AdapterLike | None = None,
    missing: str = "error",
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
        method: ``fedavg``, ``flora-na``, ``als``, ``svd`` or ``stack``.
        rank: of the result; None is, per module, the largest client rank.
        shared: ``flora-na`` with one pair of coefficients for all modules, as the authors' code has it.
        anchor: last round's global adapter; see ``estimate``.
        align_to: an earlier global adapter to rotate the result towards (als and svd only).
        missing: a module that a client lacks is an ``error``; or the others' weights are scaled to sum 1
            (``renormalize``); or its update counts as ``zero``.
        residual: also return ``dW - BA`` as an adapter of rank R + r (float32 or wider).
        backend: ``auto``, ``triton`` or ``torch``.
        progress: called with (modules done, modules in all, module name).
        names: the clients' labels in errors and reports.

    Returns:
        The adapter (every layer with scaling 1), the residual or None, and the report.

    Raises:
        ValueError: see ``estimate``; the message names the module and the client.
    """
    check_method(method, rank, shared)
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
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
            reports[target.name] = _report(e, target)
            if progress is not None:
                progress(len(layers), len(cohort.modules), target.name)
    config = cohort.adapters[0].config
    return Aggregation(
        Adapter(layers, extras, config),
        Adapter(rests, {}, config) if residual else None,
        Report(method, dict(zip(cohort.names, cohort.weights.tolist(), strict=True)), reports),
    )


def _report(estimate: Estimate, target: Target) -> ModuleReport:
    report = ModuleReport.of(estimate)
    return report if sum(target.ranks) <= LAZY_RANK else report.settled()


def _previous(targets: list[Target], adapter: Adapter | None) -> list[tuple[Tensor, Tensor]] | None:
    """Earlier factors with the scaling split over both, as the result has it."""
    if adapter is None:
        return None
    layers = [adapter.modules[t.name] for t in targets]
    roots = [abs(layer.scaling) ** 0.5 for layer in layers]
    return [
        (layer.B * (root if layer.scaling > 0 else -root), layer.A * root)
        for layer, root in zip(layers, roots, strict=True)
    ]


def chunks(cohort: Cohort, anchor: Adapter | None, *, whole: bool) -> Iterator[list[Target]]:
    """Modules in portions whose factors fit the budget; all at once where one solve spans them."""
    chunk: list[Target] = []
    size = 0
    for module in cohort.modules:
        target = cohort.target(module, anchor)
        chunk.append(target)
        size += sum(x.nbytes for x in (*target.B, *target.A))
        if not whole and size >= (CHUNK_BYTES if target.device.type == "cpu" else CHUNK_BYTES_GPU):
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
