"""Which rank does what: modules by cost, full tensors with the module they belong to or where there is room."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import sizing


@dataclass(frozen=True)
class Unit:
    """What is aggregated in one go: a module, and the full tensors that go along with it."""

    module: str
    extras: tuple[str, ...] = ()


def plan(modules: Mapping[str, float], extras: Mapping[str, float], ranks: int) -> list[list[Unit]]:
    """The units of every rank, in the order of the modules.

    Args:
        modules: name -> cost, at least one.
        extras: name of a full tensor -> cost.
        ranks: how many there are; those beyond the number of modules have nothing to do.
    """
    joined = {name: owner_of(name, modules) for name in extras}
    costs = dict(modules)
    for name, module in joined.items():
        if module is not None:
            costs[module] += extras[name]
    owners = dict(zip(costs, sizing.assign(list(costs.values()), ranks), strict=True))
    work = [[module for module in modules if owners[module] == k] for k in range(ranks)]
    loads = [sum(costs[module] for module in mine) if mine else float("inf") for mine in work]
    free = [name for name in extras if joined[name] is None]
    for place, (name, k) in enumerate(
        zip(free, sizing.assign([extras[name] for name in free], ranks, loads), strict=True)
    ):
        joined[name] = work[k][place % len(work[k])]
    return [
        [Unit(module, tuple(name for name in extras if joined[name] == module)) for module in mine] for mine in work
    ]


def owner_of(name: str, modules: Collection[str]) -> str | None:
    """The module whose name stands, whole, in that of a full tensor (its bias, say); the longest one."""
    return max((part for part in _runs(name.split(".")) if part in modules), key=len, default=None)


def module_cost(m: int, n: int, rank: int, itemsize: int, clients: int) -> float:
    """In seconds of the model's host."""
    return sizing.seconds(sizing.Module(m, n, rank, itemsize), clients)


def extra_cost(nbytes: int, clients: int) -> float:
    """A full tensor is read, and added up about as fast."""
    return 2 * clients * nbytes / sizing.Host().storage


def _runs(parts: Sequence[str]) -> Iterator[str]:
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:stop])
