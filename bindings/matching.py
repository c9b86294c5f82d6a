"""Both systems together: match the clients' LoRA updates in weight space, then estimate one pair for the match.

STAMP's spatial matching needs inner products of the clients' updates and a weighted combination of them. For LoRA both
come from the factors: ``flora_na.client_gramian`` is the Gram matrix of the whole products, ``stamp.solve_dual`` gives
the combination ``sum_u v_u s_u B_u A_u``, and ``flora_na.aggregate`` one pair of factors for it. The two systems do
not know each other, so the piece that joins them is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgram import flora_na, stamp
from fedgram.flora_na import Adapter, AdapterLike, LoraLayer, Report
from fedgram.flora_na.cohort import Cohort, average_extra, average_extras, extra_roles, make_cohort
from fedgram.flora_na.layer import as_adapter
from fedgram.stamp import Dual

from ._peft.lazy_tensors import LazyMapping


@dataclass(frozen=True, eq=False)
class MatchedAggregation:
    """The global adapter of a matched round.

    Attributes:
        adapter: one pair per module for ``sum_u v_u s_u B_u A_u``; every layer's scaling says how to multiply.
        dual: weights, coefficients ``v`` and the certificate of the matching.
        gramian: (U, U) inner products of the clients' whole updates that it was solved on.
        report: divergences of the pair from the matched combination, module by module, and that combination's norms;
            ``report.clients`` are the shares ``|v_u| / sum |v|``.
        residual: what the pair leaves out, or None.
    """

    adapter: Adapter
    dual: Dual
    gramian: Tensor
    report: Report
    residual: Adapter | None


@torch.no_grad()
def match_adapters(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float] | Tensor | None = None,
    *,
    c: float = 0.25,
    rescale: bool | str = "mean",
    method: str = "als",
    rank: int | None = None,
    align_to: AdapterLike | None = None,
    missing: str = "zero",
    residual: bool = False,
    backend: str = "auto",
    names: Sequence[str] | None = None,
) -> MatchedAggregation:
    """Aggregate adapters along the direction that helps the worst-off client (arXiv:2506.12031 on arXiv:2509.26399).

    The matching is over whole updates ``s_u B_u A_u`` of all modules, as vectors in weight space; no dense update is
    formed. With ``c = 0`` it is ``flora_na.aggregate``.

    Args:
        adapters: one per client.
        weights: of the mean update (sample counts); uniform by default. Clients of weight 0 take no part.
        c: strength of the matching in [0, 1).
        rescale: as in ``stamp.solve_dual``; "mean" makes clients that agree give exactly their mean.
        method, rank, align_to, residual, backend, names: as in ``flora_na.aggregate``.
        missing: ``zero`` counts a module that a client lacks as a zero update; ``error`` refuses it.

    Returns:
        The adapter with its two certificates: the gap of the matching, and rho of the estimate. Full tensors trained
        beside the factors are averaged with ``weights``: they are states, not updates. LoRA biases are updates: they
        are combined by ``v``, without a part in the matching.

    Raises:
        ValueError: as ``flora_na.aggregate`` and ``stamp.solve_dual``; ``missing="renormalize"`` has no meaning here.
    """
    if missing not in ("zero", "error"):
        raise ValueError(f"missing: expected 'zero' or 'error', got {missing!r}")
    cohort = make_cohort(adapters, weights, names=names, missing=missing)
    gramian = flora_na.client_gramian(cohort.adapters, missing=missing, backend=backend, names=cohort.names)
    dual = stamp.solve_dual(gramian, c, cohort.weights, rescale=rescale)
    v = dual.coefficients.cpu()
    mass = float(v.abs().sum())
    shares = v.abs() / mass if mass > 0 else cohort.weights
    estimate = flora_na.aggregate(
        [_signed(a, float(x)) for a, x in zip(cohort.adapters, v, strict=True)],
        shares,
        method=method,
        rank=rank,
        align_to=align_to,
        missing=missing,
        residual=residual,
        backend=backend,
        names=cohort.names,
    )
    adapter = replace(_scaled(estimate.adapter, mass), extras=_extras(cohort, v), roles=extra_roles(cohort))
    rest = None if estimate.residual is None else _scaled(estimate.residual, mass)
    return MatchedAggregation(adapter, dual, gramian, _lengthened(estimate.report, mass), rest)


def _signed(adapter: AdapterLike, coefficient: float) -> Adapter:
    """The adapter without its extras, negated where its coefficient is negative."""
    given = as_adapter(adapter)
    negated = LazyMapping(given.modules, lambda name: _times(given.modules[name], -1.0))
    return Adapter(negated if coefficient < 0 else given.modules, {}, given.config)


def _extras(cohort: Cohort, v: Tensor) -> dict[str, Tensor]:
    """Means of the full tensors, and sums by ``v`` of those that are updates."""
    extras = average_extras(cohort)
    updates = [name for name, role in extra_roles(cohort).items() if role == "update"]
    return extras | {name: average_extra(cohort, name, v) for name in updates}


def _scaled(adapter: Adapter, factor: float) -> Adapter:
    layers = {name: _times(layer, factor) for name, layer in adapter.modules.items()}
    return Adapter(layers, adapter.extras, adapter.config)


def _times(layer: LoraLayer, factor: float) -> LoraLayer:
    return LoraLayer(A=layer.A, B=layer.B, scaling=layer.scaling * factor)


def _lengthened(report: Report, factor: float) -> Report:
    """The report of an aggregate multiplied by a number: norms grow with it, divergences are relative."""
    return replace(report, modules={name: replace(m, norm=m.norm * factor) for name, m in report.modules.items()})
