"""What an aggregation over ranks costs: bytes moved, memory of a rank, and time, from shapes and a few stated rates.

The same model balances the modules over the ranks in ``aggregate_sharded`` and makes the tables of docs/sizing.md
(``bench.sizing_tables``). Its assumptions:

- one rank per host, and every client has every module; results are pairs of the clients' rank and dtype;
- bytes are counted exactly (without headers of some kilobytes a message); a rank's phases follow each other;
- flops are those of ``als`` with the report's yardsticks, on CPUs, in float64: where Grams are formed
  (``flora_na.group.forms_grams``) these and dense algebra on them, elsewhere some products with the factors and four
  exact norms of sums of the clients' products;
- memory is that of the factors of the largest module of all clients and of the work on it, and of the results that a
  rank holds.

The constants of the work are measured: fitted to CPU seconds and to the growth of the process, see docs/sizing.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedgram.flora_na.group import forms_grams

DENSE, SQUARES = 13, 12.5
"""With Grams: flops of the algebra on them, in R^3, and matrices of R x R that are held."""
PRODUCTS, NORMS, OVERSAMPLING = 13, 4, 8
"""Without: products with the Grams of both sides, exact norms, and columns of a product beyond the rank."""
COPIES = 3.5
"""Without: the factors and what the work on them takes, in units of the factors in 16 bits."""
WORK = 10e6
"""Bytes of buffers that do not depend on the clients."""
OPENING, LAYER = 55e-6, 70e-6
"""Seconds of one core, measured: to open a client's file, by its modules; and to read a layer, beside its bytes."""
PROCESS = 350e6
"""Bytes of a process that has imported torch and nothing else."""


@dataclass(frozen=True)
class Module:
    """One module of every client's adapter: updates of (m, n), all of rank ``rank``."""

    m: int
    n: int
    rank: int
    itemsize: int = 2

    @property
    def bytes(self) -> int:
        """One client's factors."""
        return self.rank * (self.m + self.n) * self.itemsize


@dataclass(frozen=True)
class Host:
    """Rates that one host sustains: assumptions, to be replaced by your own measurements.

    Attributes:
        storage: bytes/s that it reads from where the adapters are, all other hosts reading too.
        network: bytes/s in each direction.
        arithmetic: flop/s of the float64 work on all its cores: 16 of those that the model was fitted to.
    """

    storage: float = 1e9
    network: float = 2.5e9
    arithmetic: float = 16 * 22e9


@dataclass(frozen=True)
class Cost:
    """Of one aggregation; bytes and seconds of the rank that has most of each.

    Attributes:
        factors: bytes of all clients' factors.
        read: bytes that a rank reads from storage.
        sent, received: bytes of factors that a rank exchanges with others.
        gathered: bytes of results that rank 0 receives.
        memory: bytes that a rank, and rank 0 with the results of all, holds at most.
        open_seconds, read_seconds, exchange_seconds, solve_seconds: of each phase; the first two without the bytes,
            and the bytes alone.
    """

    factors: int
    read: float
    sent: float
    received: float
    gathered: float
    memory: float
    open_seconds: float
    read_seconds: float
    exchange_seconds: float
    solve_seconds: float

    @property
    def seconds(self) -> float:
        """All phases, one after another."""
        return self.open_seconds + self.read_seconds + self.exchange_seconds + self.solve_seconds


def llama_7b(rank: int = 16, itemsize: int = 2) -> list[Module]:
    """All linear layers of a 7B Llama: 32 blocks of four 4096 x 4096, and three between 4096 and 11008."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [Module(m, n, rank, itemsize) for _ in range(32) for m, n in block]


def flops(module: Module, clients: int) -> float:
    """Float64 operations of one module: estimate, rho and yardsticks."""
    R, length = clients * module.rank, module.m + module.n
    if forms_grams(R, length):
        return 2.0 * R * R * length + DENSE * R**3
    products = 4.0 * R * (module.rank + OVERSAMPLING) * length * PRODUCTS
    return products + NORMS * 2.0 * module.m * module.n * R


def working_memory(module: Module, clients: int) -> float:
    """Bytes at work on one module: the factors of all clients, and the Grams or converted pieces of them."""
    R, factors = clients * module.rank, clients * module.bytes
    if forms_grams(R, module.m + module.n):
        return factors + SQUARES * 8 * R * R + WORK
    return COPIES * factors + WORK


def seconds(module: Module, clients: int, host: Host | None = None) -> float:
    """Of one rank for one module, reading included: what the ranks' loads are balanced by."""
    host = host or Host()
    return clients * module.bytes / host.storage + flops(module, clients) / host.arithmetic


def assign(costs: Sequence[float], ranks: int, loads: Iterable[float] | None = None) -> list[int]:
    """A rank for every cost: the costliest first, each to the rank with the least so far, the first of equals.

    The largest load is at most 4/3 of the best possible (Graham's bound for this rule); the answer depends on nothing
    but the arguments.

    Args:
        costs: not negative.
        ranks: how many there are.
        loads: what each rank has to do already; 0 by default. An infinite load takes a rank out.
    """
    sums = [0.0] * ranks if loads is None else list(loads)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda k: (sums[k], k))
        sums[owners[i]] += costs[i]
    return owners


def aggregation(modules: Sequence[Module], clients: int, hosts: int, *, own: bool, host: Host | None = None) -> Cost:
    """The cost of ``aggregate_sharded`` with one rank on each of ``hosts`` hosts.

    Args:
        modules: of one client's adapter.
        clients: how many there are.
        hosts: how many there are.
        own: whether the clients' files lie on different hosts, evenly (``clients="own"``), or where all hosts read
            them (``clients="all"``).
        host: its rates.

    Raises:
        ValueError: no clients, no hosts or no modules.
    """
    if min(clients, hosts, len(modules)) < 1:
        raise ValueError(f"clients, hosts, modules: expected at least one, got {clients}, {hosts}, {len(modules)}")
    host = host or Host()
    owners = assign([seconds(module, clients, host) for module in modules], hosts)
    mine = [[m for m, k in zip(modules, owners, strict=True) if k == rank] for rank in range(hosts)]
    adapter = sum(module.bytes for module in modules)
    owned = [sum(module.bytes for module in work) for work in mine]
    at_hand = -(-clients // hosts)
    largest = max(module.bytes for module in modules)
    if own:
        read = float(at_hand * adapter)
        opened, layers = at_hand, at_hand * len(modules)
        sent, received = at_hand * (adapter - min(owned)), (clients - clients // hosts) * max(owned)
        outgoing = at_hand * largest * min(hosts, len(modules))
    else:
        read, sent, received, outgoing = clients * max(owned) + adapter / hosts, 0, 0, 0
        opened, layers = clients, clients * max(map(len, mine))
    exchanged = max(sent, received) if hosts > 1 else 0
    gathered = adapter - owned[0]
    return Cost(
        clients * adapter,
        read,
        sent if hosts > 1 else 0,
        received if hosts > 1 else 0,
        gathered,
        PROCESS + max(working_memory(m, clients) for m in modules) + outgoing * (2 if hosts > 1 else 0) + 2 * adapter,
        OPENING * opened * len(modules) + LAYER * layers,
        read / host.storage,
        (exchanged + gathered) / host.network,
        max(sum(flops(module, clients) for module in work) for work in mine) / host.arithmetic,
    )
