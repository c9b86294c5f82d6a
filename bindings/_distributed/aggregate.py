"""``aggregate_sharded``: every module of the adapters is aggregated on one rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from fedgram import flora_na
from fedgram.flora_na import Adapter, AdapterLike, Aggregation, LoraLayer, Report
from fedgram.flora_na.layer import as_adapter
from fedgram.flora_na.rank_choice import Rank

from .clients import Clients, everyone_has_all, everyone_has_own
from .plan import Unit, plan
from .ranks import Ranks
from .watch import Watch

CLIENTS = ("all", "own")
RESULTS = ("root", "all", "sharded")
WHOLE = ("shared", "clip", "min_cosine")
"""Options whose outcome depends on all modules at once."""

T = TypeVar("T")
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, eq=False)
class ShardedAggregation(Aggregation):
    """An aggregation as one rank holds it; see ``result`` of ``aggregate_sharded``.

    Attributes:
        owned: the modules that this rank aggregated.
        sent, received: bytes of factors and results that this rank exchanged with others.
    """

    owned: tuple[str, ...] = ()
    sent: int = 0
    received: int = 0


def aggregate_sharded(
    adapters: Sequence[AdapterLike],
    weights: Sequence[float] | Tensor | None = None,
    *,
    clients: str = "all",
    result: str = "root",
    method: str = "als",
    rank: Rank = None,
    shared: bool = False,
    anchor: AdapterLike | None = None,
    align_to: AdapterLike | None = None,
    missing: str = "error",
    residual: bool = False,
    backend: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    names: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> ShardedAggregation:
    """``flora_na.aggregate`` (arXiv:2509.26399) with the modules shared out over the ranks of a process group.

    Modules go to ranks by their cost (``sizing.assign``), and each is aggregated by itself: the result has the same
    bits for every number of ranks. It has those of ``flora_na.aggregate`` called with that one module; called with all
    of them, ``als`` and ``flora-na`` iterate some modules together and may stop later, within their tolerance.

    Args:
        adapters: with ``clients="all"``, all clients, the same on every rank: adapters opened from files that all
            ranks reach, of which each rank reads its own modules only. With ``clients="own"``, the clients whose
            factors lie on this rank (or none); the clients of all ranks, in rank order, are aggregated, and every
            factor travels once, to the rank that needs it, in rounds of one module per rank.
        weights, names: of ``adapters``; with ``clients="own"`` on all ranks or on none.
        result: where the whole result goes: to rank 0 of the group ("root"; the other ranks keep their own modules),
            to "all", or nowhere ("sharded": each keeps its own).
        method, rank, anchor, align_to, missing, residual, backend, options: as in ``flora_na.aggregate``, the same on
            every rank, down to the numbers of ``anchor`` and ``align_to``, which each rank therefore reads whole. Of
            these a rank may have just the modules that an earlier round has left to it.
        shared: must be False, like every option that needs all modules at once (``clip``, ``min_cosine``).
        progress: called on each rank with (its modules done, its modules in all, module name).
        group: default the whole world. With gloo tensors travel through the CPU; with nccl through this process's
            current device, where adapters on an accelerator also arrive.
        watch: over the ranks of the group; finds those that fail or die while others compute. Without one, they are
            found at the next collective, at the latest by the group's timeout.

    Raises:
        ValueError, OSError: as ``flora_na.aggregate``, on the rank that found it; or ranks called with different
            arguments.
        RankError: on all other ranks, and where another rank has died.
    """
    ranks = Ranks(group, watch)
    settings: dict[str, Any] = {"method": method, "rank": rank, "missing": missing, "residual": residual}
    settings |= {"anchor": anchor, "align_to": align_to, "backend": backend, **options}
    with ranks.together():
        _check(clients, result, {"shared": shared, **options})
        local = [as_adapter(adapter) for adapter in adapters]
        called = {"clients": clients, "result": result, **settings}
        agreed = {name: _comparable(value) for name, value in called.items()}
    join = everyone_has_all if clients == "all" else everyone_has_own
    known = join(ranks, local, weights, names, agreed)
    work = plan(*known.costs(ranks), ranks.count)
    solve = partial(_solve, known, settings)
    parts: list[Aggregation] = []
    mine = work[ranks.rank]
    with ranks.together():
        for unit, slices in known.slices(ranks, work):
            parts.append(solve(unit, slices))
            if progress is not None:
                progress(len(parts), len(mine), unit.module)
            if watch is not None:
                watch.check()
    parts = _collect(ranks, result, parts)
    return _assemble(ranks, known, parts, method, residual, tuple(unit.module for unit in mine))


def _solve(clients: Clients, settings: Mapping[str, Any], unit: Unit, slices: Sequence[Adapter]) -> Aggregation:
    """One unit, ready to travel: its yardsticks are numbers."""
    done = flora_na.aggregate(slices, clients.weights, names=clients.names, **settings)
    return replace(done, report=done.report.settled())


def _collect(ranks: Ranks, result: str, parts: list[Aggregation]) -> list[Aggregation]:
    """The parts that this rank is to hold."""
    if result == "sharded":
        return parts
    everyone = ranks.gather(parts) if result == "all" else ranks.gather_to([0], parts)
    return [part for one in everyone for part in one] if everyone else parts


def _assemble(
    ranks: Ranks, clients: Clients, parts: list[Aggregation], method: str, residual: bool, owned: tuple[str, ...]
) -> ShardedAggregation:
    """Parts of single modules as one aggregation, modules and extras in the order in which the clients have them."""
    layers = _join((part.adapter.modules for part in parts), clients.modules)
    extras = _join((part.adapter.extras for part in parts), clients.extras)
    rests = _join((part.residual.modules for part in parts if part.residual is not None), clients.modules)
    reports = _join((part.report.modules for part in parts), clients.modules)
    roles = {name: role for part in parts for name, role in part.adapter.roles.items() if name in extras}
    config = parts[0].adapter.config if parts else None
    shares = parts[0].report.clients if parts else {}
    whole = Aggregation(
        Adapter(layers, extras, config, roles),
        Adapter(rests, {}, config) if residual else None,
        Report(method, shares, reports),
    )
    known = {field.name: getattr(whole, field.name) for field in fields(Aggregation)}
    return ShardedAggregation(**known, owned=owned, sent=ranks.sent, received=ranks.received)


def _join(pieces: Iterable[Mapping[str, T]], order: Sequence[str]) -> dict[str, T]:
    found = {name: value for piece in pieces for name, value in piece.items()}
    first = {name: found[name] for name in order if name in found}
    return first | found


def _check(clients: str, result: str, options: Mapping[str, Any]) -> None:
    if clients not in CLIENTS:
        raise ValueError(f"clients: expected one of {', '.join(CLIENTS)}, got {clients!r}")
    if result not in RESULTS:
        raise ValueError(f"result: expected one of {', '.join(RESULTS)}, got {result!r}")
    for name in WHOLE:
        value = options.get(name)
        if value is not None and (value or name != "shared"):  # a min_cosine of 0 is a bound
            raise ValueError(
                f"{name}: needs all modules in one place, and ranks share them out: aggregate in one process"
            )


def _comparable(option: Any) -> Any:
    """What tells an option from another rank's: of an adapter, of which each rank uses its part, a digest by module."""
    if isinstance(option, Adapter | Mapping):
        return {name: _digest(layer) for name, layer in as_adapter(option).modules.items()}
    return option if isinstance(option, PLAIN) else type(option).__name__


def _digest(layer: LoraLayer) -> str:
    digest = hashlib.sha256()
    for factor in (layer.A, layer.B):
        digest.update(repr((layer.scaling, factor.shape, factor.dtype)).encode())
        digest.update(factor.detach().cpu().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
