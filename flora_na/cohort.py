"""Which clients take part in which module: the join over adapters that may lack modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fedgram.kernels import FLOATS

from .finite import is_finite
from .layer import Adapter, AdapterLike, LoraLayer, MergingConfig, as_adapter
from .target import DTYPES_NAMED, Target, make_target
from .weights import Weights, normalise_weights

MISSING = ("error", "renormalize", "zero")
"""Policies for a module that some clients of positive weight lack; ``S`` are those that have it.

==============  ========================================================  ============================================
policy          target of the module                                      of a full tensor beside the factors
==============  ========================================================  ============================================
``error``       none: refused                                             none: refused
``renormalize`` ``sum_{u in S} w_u s_u B_u A_u / sum_{u in S} w_u``       the mean over S, weights scaled to sum 1
``zero``        ``sum_{u in S} w_u s_u B_u A_u``: the others' update is 0  refused, but an update (a LoRA bias) is 0
==============  ========================================================  ============================================

``renormalize`` says that a client which does not train a module has no opinion on it, ``zero`` that it wants it
unchanged; the second shrinks the update by the weight of S.
"""


@dataclass(frozen=True, eq=False)
class Cohort:
    """The clients of one aggregation, checked.

    Attributes:
        adapters: of the clients with positive weight.
        weights: (U,) float64 of those clients, sum 1.
        names: their labels, for messages and reports.
        modules: the union of their modules, in the order of first appearance.
        missing: the policy for a module that a client lacks.
        config: of the result.
    """

    adapters: tuple[Adapter, ...]
    weights: Tensor
    names: tuple[str, ...]
    modules: tuple[str, ...]
    missing: str = "error"
    config: Mapping[str, Any] | None = None

    @property
    def held(self) -> bool:
        """Whether the factors lie in memory already; of a lazy mapping they do while someone keeps them."""
        return all(getattr(a.modules, "held", isinstance(a.modules, dict)) for a in self.adapters)

    def present(self, module: str) -> list[int]:
        """Positions of the clients that have the module."""
        return [u for u, adapter in enumerate(self.adapters) if module in adapter.modules]

    def exceeds_a_side(self, module: str) -> bool:
        """Whether the clients' ranks of a module are together more than its rows or columns.

        False where that is not known without reading: mappings may tell the (m, n, r) of a layer by ``sizes(module)``.
        """
        known = [(a.modules, getattr(a.modules, "sizes", None)) for a in self.adapters]
        sizes = [of(module) for modules, of in known if of is not None and module in modules]
        return sum(r for *_, r in sizes) > min((min(m, n) for m, n, _ in sizes), default=0)

    def layer(self, client: int, module: str) -> LoraLayer:
        """Read one client's layer of a module that it has."""
        return read_layer(self.adapters[client], module, self.names[client])

    def target(self, module: str, anchor: Adapter | None = None) -> Target:
        """Read the module's layers and put its target together.

        A client without the module counts as a zero update (``zero``), or the weights of the others are scaled to
        sum 1 (``renormalize``).
        """
        clients = self.present(module)
        layers = [self.layer(u, module) for u in clients]
        whole = len(clients) == len(self.adapters)
        weights, names = self.weights, self.names
        if not whole:
            weights, names = weights[clients], tuple([names[u] for u in clients])
        if self.missing == "renormalize" and not whole:
            weights = weights / weights.sum()
        base = None if anchor is None else read_layer(anchor, module, "the anchor").trimmed()
        return make_target(
            [layer.B for layer in layers],
            [layer.A for layer in layers],
            weights,
            [layer.scaling for layer in layers],
            anchor=None if base is None else (base.B, base.A),
            anchor_scaling=1.0 if base is None else base.scaling,
            name=module,
            clients=names,
        )


def read_layer(adapter: Adapter, module: str, owner: str) -> LoraLayer:
    """Read one layer; ValueError names the owner where there is none, or something else in its place."""
    try:
        layer = adapter.modules[module]
    except KeyError:
        raise ValueError(f"{module}: {owner} has no such module") from None
    if not isinstance(layer, LoraLayer):
        raise ValueError(f"{module}: {owner} has a {type(layer).__name__} there: expected a LoraLayer")
    return layer


def make_cohort(
    adapters: Sequence[AdapterLike],
    weights: Weights = None,
    *,
    names: Sequence[str] | None = None,
    missing: str = "error",
) -> Cohort:
    """Check weights, names and modules of the clients, and leave out clients of weight zero.

    Raises:
        ValueError: no clients, bad weights, wrong number of names, unknown policy, no modules, a module that a client
            lacks under ``missing="error"``, or configurations that do not go together (see ``MergingConfig``).
    """
    if missing not in MISSING:
        raise ValueError(f"missing: expected one of {', '.join(MISSING)}, got {missing!r}")
    if not isinstance(adapters, Sequence):
        raise ValueError(f"adapters: expected a sequence, one adapter per client, got a {type(adapters).__name__}")
    w = normalise_weights(weights, len(adapters))
    labels = client_labels(names, len(adapters))
    active = [u for u, weight in enumerate(w.tolist()) if weight > 0]
    kept = [as_adapter(adapters[u], labels[u]) for u in active]
    modules = tuple(dict.fromkeys(name for adapter in kept for name in adapter.modules))
    chosen = [labels[u] for u in active]
    config = _merged_config([adapter.config for adapter in kept], chosen)
    cohort = Cohort(tuple(kept), w[active], tuple(chosen), modules, missing, config)
    if not modules:
        raise ValueError("adapters: no client has a LoRA module")
    if missing == "error":
        _require_all(cohort)
    return cohort


def _merged_config(configs: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> Mapping[str, Any] | None:
    """What the first configuration that can merge makes of all; the first client's where none can."""
    for config in configs:
        if isinstance(config, MergingConfig):
            return config.merged(configs, names)
    return configs[0]


def client_labels(names: Sequence[str] | None, count: int) -> list[str]:
    """One label per client, each of another name; ValueError unless there are as many names as clients."""
    if names is None:
        return [f"client {u}" for u in range(count)]
    labels = numbered(list(names))
    if len(labels) != count:
        raise ValueError(f"names: expected {count} (one per client), got {len(labels)}")
    return labels


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number to those that are there already: reports are by name."""
    taken, labels = set(names), []
    numbers: dict[str, Iterator[int]] = {}
    for name in names:
        label = name
        if name in numbers:
            while label in taken:
                label = f"{name} ({next(numbers[name])})"
        numbers.setdefault(name, count(2))
        taken.add(label)
        labels.append(label)
    return labels


def _require_all(cohort: Cohort) -> None:
    for module in cohort.modules:
        for u, adapter in enumerate(cohort.adapters):
            if module not in adapter.modules:
                others = len(cohort.present(module))
                raise ValueError(
                    f"{module}: {cohort.names[u]} has no such module, {others} other client(s) have; "
                    "choose missing='renormalize' or 'zero' (--missing) to go on"
                )


def average_extras(cohort: Cohort) -> dict[str, Tensor]:
    """``average_extra`` of every tensor that a client has beside its factors."""
    names = dict.fromkeys(name for adapter in cohort.adapters for name in adapter.extras)
    return {name: average_extra(cohort, name) for name in names}


def extra_roles(cohort: Cohort) -> dict[str, str]:
    """The roles of all extras that are not plain means (see ``Adapter.roles``)."""
    return {name: role for adapter in reversed(cohort.adapters) for name, role in adapter.roles.items()}


def average_extra(cohort: Cohort, name: str, coefficients: Tensor | None = None) -> Tensor:
    """The weighted mean of one full tensor trained beside the factors, accumulated in float64.

    The dtype is the one that all clients' dtypes promote to. Integers and tensors of the role ``frozen`` are not
    averaged: they must be the same in all clients. What a client lacks is an error; or, under ``renormalize``, the
    mean is over the others; under ``zero`` only a tensor of the role ``update`` counts as zero, since a trained state
    has no zero to stand for it.

    Args:
        cohort: the clients.
        name: of the tensor.
        coefficients: (U,) float64, for a tensor of the role ``update``: return the sum with these in place of the
            weights.

    Raises:
        ValueError: a client lacks it, shapes differ, it is not finite, or not the same where it must be.
    """
    present = [u for u, adapter in enumerate(cohort.adapters) if name in adapter.extras]
    role = next((adapter.roles[name] for adapter in cohort.adapters if name in adapter.roles), "mean")
    _check_absent(cohort, name, present, role)
    weights = cohort.weights[present] if coefficients is None else coefficients[present]
    if coefficients is None and not (cohort.missing == "zero" and role == "update"):
        weights = weights / weights.sum()
    first = _read_extra(cohort, present[0], name)
    exact = role == "frozen" or not first.is_floating_point()
    dtype, total = first.dtype, None
    for u, w in zip(present, weights.tolist(), strict=True):
        tensor = first if u == present[0] else _read_extra(cohort, u, name)
        labels = (cohort.names[u], cohort.names[present[0]])
        _check_extra(tensor, first, name, *labels, averaged=not exact)
        if exact:
            _check_equal(tensor, first, name, *labels)
            continue
        dtype = torch.promote_types(dtype, tensor.dtype)
        total = tensor.double() * w if total is None else total.add_(tensor.double(), alpha=w)
    return first.clone() if total is None else total.to(dtype)


def _check_absent(cohort: Cohort, name: str, present: list[int], role: str) -> None:
    if len(present) == len(cohort.adapters) or cohort.missing == "renormalize":
        return
    if cohort.missing == "zero" and role == "update":
        return
    absent = next(u for u in range(len(cohort.adapters)) if u not in present)
    raise ValueError(f"{name}: {cohort.names[absent]} has no such tensor; a full tensor has no zero to stand for it")


def _read_extra(cohort: Cohort, client: int, name: str) -> Tensor:
    tensor = cohort.adapters[client].extras[name]
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        kind = "tensor without numbers (meta)" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: {cohort.names[client]} has a {kind}: expected a torch.Tensor")
    return tensor


def _check_extra(tensor: Tensor, like: Tensor, name: str, client: str, first: str, *, averaged: bool) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: {client} has shape {tuple(tensor.shape)}, {first} has {tuple(like.shape)}")
    if tensor.is_complex() or tensor.is_floating_point() != like.is_floating_point():
        raise ValueError(f"{name}: {client} has dtype {tensor.dtype}, {first} {like.dtype}: expected floating point")
    if averaged and tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: {client} has dtype {tensor.dtype}, which is not averaged: expected {DTYPES_NAMED}")
    if tensor.dtype in FLOATS and not is_finite(tensor):
        raise ValueError(f"{name}: the tensor of {client} contains NaN or Inf")


def _check_equal(tensor: Tensor, like: Tensor, name: str, client: str, first: str) -> None:
    if tensor is not like and not torch.equal(tensor, like):
        kind = "a base tensor that is stored but not trained" if like.is_floating_point() else "integers"
        raise ValueError(f"{name}: {client} and {first} differ: {kind} cannot be averaged, and must be the same")


def check_anchor(anchor: AdapterLike | None, cohort: Cohort, argument: str) -> Adapter | None:
    """An anchor or a previous adapter, which must have every module."""
    if anchor is None:
        return None
    adapter = as_adapter(anchor, argument)
    lacking = [name for name in cohort.modules if name not in adapter.modules]
    if lacking:
        raise ValueError(f"{argument}: has no module {lacking[0]}")
    return adapter
