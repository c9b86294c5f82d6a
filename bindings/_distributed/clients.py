"""The clients of a sharded aggregation: what every rank knows of all of them, and how their factors reach a rank."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from fedgram.flora_na import Adapter
from fedgram.flora_na.weights import normalise_weights, real_numbers

from .._peft.lazy_tensors import LazyMapping
from .plan import Unit, extra_cost, module_cost
from .ranks import Ranks, check_alike, check_options

T = TypeVar("T")
Facts = list[tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Clients:
    """All clients, of which some adapters are at hand.

    Attributes:
        adapters: position among all clients -> adapter, of those that this rank can read.
        weights: of all clients.
        names: of all clients.
        modules, extras: the unions over all clients of positive weight, in the order of first appearance.
        shells: all clients' adapters without modules and extras.
        everywhere: whether every rank can read all of them.
    """

    adapters: Mapping[int, Adapter]
    weights: list[float]
    names: list[str]
    modules: list[str]
    extras: list[str]
    shells: list[Adapter]
    everywhere: bool

    def costs(self, ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
        """Costs of modules and extras, the same on all ranks: each rank looks at one client for its share of them."""
        with ranks.together():
            found = (
                self._module_costs(self.modules[ranks.rank :: ranks.count]),
                self._extra_costs(self.extras[ranks.rank :: ranks.count]),
            )
        known = ranks.gather(found)
        return _filled(self.modules, [one[0] for one in known]), _filled(self.extras, [one[1] for one in known])

    def _module_costs(self, names: Sequence[str]) -> dict[str, float]:
        costs = {}
        for name in names:
            adapter = next((a for a in self.adapters.values() if name in a.modules), None)
            if adapter is not None:
                layer = adapter.modules[name]
                costs[name] = module_cost(*layer.shape, layer.rank, layer.A.itemsize, len(self.names))
        return costs

    def _extra_costs(self, names: Sequence[str]) -> dict[str, float]:
        costs = {}
        for name in names:
            adapter = next((a for a in self.adapters.values() if name in a.extras), None)
            if adapter is not None:
                costs[name] = extra_cost(adapter.extras[name].nbytes, len(self.names))
        return costs

    def slices(self, ranks: Ranks, work: Sequence[Sequence[Unit]]) -> Iterator[tuple[Unit, list[Adapter]]]:
        """This rank's units, each with all clients' adapters cut down to it."""
        if self.everywhere:
            for unit in work[ranks.rank]:
                yield unit, [_cut(self.adapters[u], unit) for u in range(len(self.names))]
            return
        for turn in range(max(len(units) for units in work)):
            due = {k: units[turn] for k, units in enumerate(work) if turn < len(units)}
            received = ranks.send_each({k: self._read(unit) for k, unit in due.items()})
            if ranks.rank in due:
                yield due[ranks.rank], self._put_together(received)

    def _read(self, unit: Unit) -> dict[int, tuple[dict[str, Any], dict[str, Tensor]]]:
        """Layers and extras of the unit, of the clients that are at hand and have a weight."""
        cuts = {u: _cut(adapter, unit) for u, adapter in self.adapters.items() if self.weights[u] > 0}
        return {u: (dict(cut.modules), dict(cut.extras)) for u, cut in cuts.items()}

    def _put_together(self, received: Sequence[Mapping[int, tuple[Any, Any]]]) -> list[Adapter]:
        layers = {u: pair for one in received for u, pair in one.items()}
        pairs = [layers.get(u, ({}, {})) for u in range(len(self.names))]
        return [
            replace(shell, modules=modules, extras=extras)
            for shell, (modules, extras) in zip(self.shells, pairs, strict=True)
        ]


def _cut(adapter: Adapter, unit: Unit) -> Adapter:
    modules, extras = _part(adapter.modules, [unit.module]), _part(adapter.extras, unit.extras)
    return replace(adapter, modules=modules, extras=extras)


def _part(whole: Mapping[str, T], names: Sequence[str]) -> Mapping[str, T]:
    """Those entries of a mapping that it has, read when they are asked for."""
    return LazyMapping([name for name in names if name in whole], whole.__getitem__)


def _filled(names: Sequence[str], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Costs in the order of the names; one that nobody could look at counts as the costliest."""
    costs = {name: cost for one in found for name, cost in one.items()}
    return {name: costs.get(name, max(costs.values(), default=1.0)) for name in names}


def everyone_has_all(
    ranks: Ranks, adapters: list[Adapter], weights: Any, names: Sequence[str] | None, agreed: Mapping[str, Any]
) -> Clients:
    """Every rank was given all clients."""
    with ranks.together():
        clients = _clients(dict(enumerate(adapters)), _facts(adapters, weights, names), everywhere=True)
    told = ranks.gather((agreed, clients.weights, clients.names, clients.modules, clients.extras, _settings(adapters)))
    check_options([mine[0] for mine in told])
    check_alike([mine[1:] for mine in told], "adapters, weights or names")
    return clients


def _settings(adapters: Sequence[Adapter]) -> list[int | None]:
    """What tells the adapters' configurations from another rank's (a stale copy's other alpha); None of one that does
    not come from a file."""
    found: list[int | None] = []
    for adapter in adapters:
        try:
            config = {key: _in_order(value) for key, value in (adapter.config or {}).items()}
            text = json.dumps(config, sort_keys=True)
        except TypeError:  # what it holds need not have the same text in another process
            found.append(None)
        else:
            found.append(zlib.crc32(text.encode()))
    return found


def _in_order(value: Any) -> Any:
    """Names in an order that every process has: lists made of sets have none."""
    return sorted(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else value


def everyone_has_own(
    ranks: Ranks, adapters: list[Adapter], weights: Any, names: Sequence[str] | None, agreed: Mapping[str, Any]
) -> Clients:
    """Every rank was given its own clients; all of them count in rank order."""
    with ranks.together():
        facts = _facts(adapters, weights, names)
    told = ranks.gather((agreed, facts))
    check_options([mine[0] for mine in told])
    start = sum(len(mine[1]) for mine in told[: ranks.rank])
    everyone = [fact for mine in told for fact in mine[1]]
    return _clients(dict(enumerate(adapters, start)), everyone, everywhere=False)


def _facts(adapters: Sequence[Adapter], weights: Any, names: Sequence[str] | None) -> Facts:
    """Of every adapter: weight, name, modules, extras, and all else that it says of itself."""
    none = [None] * len(adapters)
    shares = none if weights is None else real_numbers("weights", weights).tolist()
    labels = none if names is None else [str(name) for name in names]
    for argument, given in (("weights", shares), ("names", labels)):
        if len(given) != len(adapters):
            raise ValueError(f"{argument}: expected {len(adapters)} (one per client), got {len(given)}")
    return [
        (w, label, tuple(a.modules), tuple(a.extras), replace(a, modules={}, extras={}))
        for w, label, a in zip(shares, labels, adapters, strict=True)
    ]


def _clients(adapters: Mapping[int, Adapter], facts: Facts, *, everywhere: bool) -> Clients:
    labels = [fact[1] for fact in facts]
    given = [fact[0] for fact in facts]
    for argument, values in (("weights", given), ("names", labels)):
        if 0 < values.count(None) < len(values):
            raise ValueError(f"{argument}: given on some ranks and not on others")
    weights = [1.0] * len(facts) if None in given else given
    active = [u for u, share in enumerate(normalise_weights(weights, len(facts)).tolist()) if share > 0]
    modules = list(dict.fromkeys(name for u in active for name in facts[u][2]))
    if not modules:
        raise ValueError("adapters: no client has a LoRA module")
    return Clients(
        adapters,
        weights,
        [f"client {u}" if label is None else label for u, label in enumerate(labels)],
        modules,
        list(dict.fromkeys(name for u in active for name in facts[u][3])),
        [fact[4] for fact in facts],
        everywhere,
    )
