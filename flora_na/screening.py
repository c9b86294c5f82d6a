"""Clipping and filtering of clients by their whole updates in weight space, before anything is aggregated.

Both read only the (U, U) inner products of the clients' updates ``dW_u`` (all modules together). In this order:

1. **Clipping** scales every update longer than the bound down to it: ``c_u = min(1, bound / ||dW_u||)``. The bound is a
   norm, or a multiple of the median norm of the clients whose update is not zero, taken once, before anything changes.
2. **Filtering** drops clients whose clipped update has a cosine below ``min_cosine`` to the weighted mean of the
   clipped updates of the clients that remain. The client of lowest cosine goes first (ties together), the weights of
   the others are scaled to sum 1, and the mean is taken anew, until every client that remains reaches the cosine.

A mean can be pulled towards one long update, and then it is the others that have a low cosine: filter together with
clipping. Where more than half of the weight is dropped, ``Screening.doubtful`` says so.

So the outcome is a fixed point: filtering the clients that remain changes nothing, and neither does clipping them again
at the same bound. It does not depend on the order of the clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .cohort import Cohort, extra_roles
from .layer import Adapter, LoraLayer
from .parts import part_of, shape_of
from .weight_space import mean_cosines, norms_of

TIE = 1e-9
"""Cosines this near to each other are equal to rounding."""

Clip = float | str | None
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Screening:
    """What clipping and filtering did to every client of positive weight.

    Attributes:
        clip: as asked for: a norm, ``"2x"`` (times the median norm), or None.
        bound: the norm that updates were clipped to, or None.
        min_cosine: as asked for, or None.
        names: the clients' labels.
        norms: (U,) float64 norms of the updates before clipping.
        factors: (U,) float64 in (0, 1]: what each update is multiplied by.
        cosines: (U,) float64 to the mean: of a client that remains, the last mean; of a dropped one, the mean that it
            was dropped for.
        weights: (U,) float64, sum 1: those that the clients are aggregated with, 0 for dropped ones.
        dropped_weight: of the dropped clients together, as it was before.
    """

    clip: Clip
    bound: float | None
    min_cosine: float | None
    names: tuple[str, ...]
    norms: Tensor
    factors: Tensor
    cosines: Tensor
    weights: Tensor
    dropped_weight: float

    @property
    def clipped(self) -> list[str]:
        """Labels of the clients that were scaled down."""
        return [name for name, c in zip(self.names, self.factors.tolist(), strict=True) if c < 1]

    @property
    def dropped(self) -> list[str]:
        """Labels of the clients that were filtered out."""
        return [name for name, w in zip(self.names, self.weights.tolist(), strict=True) if w == 0]

    @property
    def doubtful(self) -> bool:
        """Whether more than half of the clients' weight was dropped: it may be the rest that should have been."""
        return self.dropped_weight > 0.5

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the options, the bound, the labels of those clipped and dropped, and every client's figures."""
        columns = (x.tolist() for x in (self.norms, self.factors, self.cosines, self.weights))
        return {
            "clip": self.clip,
            "bound": self.bound,
            "min_cosine": self.min_cosine,
            "clipped": self.clipped,
            "dropped": self.dropped,
            "dropped_weight": self.dropped_weight,
            "clients": {
                name: {"norm": norm, "factor": factor, "cosine_to_mean": cosine, "weight": weight}
                for name, norm, factor, cosine, weight in zip(self.names, *columns, strict=True)
            },
        }


def check_screening(clip: Clip, min_cosine: float | None) -> bool:
    """Whether anything is to be screened.

    Raises:
        ValueError: ``clip`` is neither a positive number nor one followed by ``x``, ``min_cosine`` not in [-1, 1].
    """
    if clip is not None:
        _multiple(clip)
    if min_cosine is not None and not (_is_number(min_cosine) and -1.0 <= min_cosine <= 1.0):
        raise ValueError(f"min_cosine: expected a number from -1 to 1, got {min_cosine!r}")
    return clip is not None or min_cosine is not None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def screen(
    gramian: Tensor, weights: Tensor, names: tuple[str, ...], clip: Clip = None, min_cosine: float | None = None
) -> Screening:
    """Decide from the inner products which updates are scaled down and which clients are left out.

    Args:
        gramian: (U, U) float64 inner products of the clients' whole unweighted updates.
        weights: (U,) float64, all positive, sum 1.
        names: the clients' labels.
        clip: the largest norm, as a number or as a multiple of the median norm (``"2x"``); None clips nothing.
        min_cosine: the smallest cosine to the mean; None drops nobody.

    Raises:
        ValueError: bad options, or no client reaches ``min_cosine``.
    """
    check_screening(clip, min_cosine)
    gramian = gramian.cpu()
    norms = norms_of(gramian)
    bound = _bound(clip, norms)
    factors = torch.ones_like(norms) if bound is None else (bound / norms).clamp_max(1.0)
    inner = gramian * factors * factors.unsqueeze(1)
    kept, angles = _filter(inner, weights, min_cosine)
    if not kept.any():
        raise ValueError(f"min_cosine: no client's update reaches a cosine of {min_cosine} to the mean of the rest")
    shares = torch.where(kept, weights, 0.0)
    shares = weights if bool(kept.all()) else shares / shares.sum()
    lost = float(weights[~kept].sum())
    clip = clip if clip is None or isinstance(clip, str | int | float) else float(clip)  # numpy's, which JSON has not
    return Screening(clip, bound, min_cosine, names, norms, factors, angles, shares, lost)


def screened(cohort: Cohort, screening: Screening) -> Cohort:
    """The cohort that is aggregated: scaled updates, without the dropped clients, their weights scaled to sum 1.

    Full tensors trained beside the factors are states, not updates: they are averaged as they are (but LoRA biases,
    which are updates, are scaled with their client's).
    """
    kept = [u for u, w in enumerate(screening.weights.tolist()) if w > 0]
    roles = extra_roles(cohort)
    adapters = tuple(scaled(cohort.adapters[u], float(screening.factors[u]), roles) for u in kept)
    left = {name for adapter in adapters for name in adapter.modules}
    if not left:
        raise ValueError("min_cosine: none of the clients that remain has a LoRA module")
    return replace(
        cohort,
        adapters=adapters,
        weights=screening.weights[kept],
        names=tuple(cohort.names[u] for u in kept),
        modules=tuple(name for name in cohort.modules if name in left),
    )


def scaled(adapter: Adapter, factor: float, roles: Mapping[str, str]) -> Adapter:
    """The adapter with its update times ``factor``: layers, and extras whose role in the cohort is ``update``.

    All are still read when asked for.
    """
    if factor == 1.0:
        return adapter

    def layer(_: str, own: LoraLayer) -> LoraLayer:
        return replace(own, scaling=own.scaling * factor)

    def extra(name: str, own: Tensor) -> Tensor:
        return own * factor if roles.get(name) == "update" else own

    return replace(adapter, modules=_Changed(adapter.modules, layer), extras=_ChangedTensors(adapter.extras, extra))


class _Changed(Mapping[str, T]):
    """A mapping whose values are changed as they are read."""

    def __init__(self, values: Mapping[str, T], change: Callable[[str, T], T]) -> None:
        self._values, self._change = values, change
        self.held = isinstance(values, dict)  # whether they lie in memory
        self.sizes = getattr(values, "sizes", None)

    def __getitem__(self, name: str) -> T:
        return self._change(name, self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values


class _ChangedTensors(_Changed[Tensor]):
    """Tensors that are changed number by number as they are read, whole or in parts."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return shape_of(self._values, name)

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The numbers ``start:stop`` of a tensor in a row."""
        return self._change(name, part_of(self._values, name, start, stop))


def _multiple(clip: float | str) -> tuple[float, bool]:
    """The number in ``clip``, and whether it multiplies the median norm."""
    text = str(clip).strip()
    try:
        value = math.nan if isinstance(clip, bool) else float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ValueError(f"clip: expected a positive norm, or a multiple of the median norm such as 2x, got {clip!r}")
    return value, text.endswith("x")


def _bound(clip: Clip, norms: Tensor) -> float | None:
    if clip is None:
        return None
    value, relative = _multiple(clip)
    active = norms[norms > 0]
    if not relative:
        return value
    return value * float(active.quantile(0.5)) if len(active) else value


def _filter(gramian: Tensor, weights: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """(U,) who remains, and the cosines that decided it."""
    kept = torch.ones_like(weights, dtype=torch.bool)
    found = mean_cosines(gramian, weights)
    while threshold is not None and kept.any():
        shares = torch.where(kept, weights, 0.0)
        found = torch.where(kept, mean_cosines(gramian, shares / shares.sum()), found)
        lowest = float(found[kept].min())
        if lowest >= threshold - TIE:
            break
        kept = kept & (found > lowest + TIE)
    return kept, found
