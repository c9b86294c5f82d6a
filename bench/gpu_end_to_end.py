"""The GPU script's workloads: whole models of adapters, from device and host; long gradients; many duals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedgram import flora_na, kernels, stamp
from fedgram.flora_na import LoraLayer

from .ceilings import Ceilings, Cost, rate_of
from .gpu_models import Arriving, Model, Pinned
from .gpu_support import Journal, host_seconds, kernel_times
from .gpu_timings import ceilings_of
from .measure import Timing, measure_one, seconds
from .reference import dense_update, gram_of, optimal_rho, relative_error
from .workloads import LLAMA_BLOCK, W1, gradients, sample_weights, task_gramian

Layers = Sequence[Mapping[str, LoraLayer]]
# Seconds that rows of W2's aggregations need, from runs of 1.35 (fedavg) and 4.2 s (flora-na) on an H100, and of 6.3 at
# most for als (1.2 times flora-na in estimate_modules there, 1.5 times in W1). A run below ONCE is repeated about eight
# times, and its profile of 100,000 kernels read: 31 s. A longer one runs twice, to be checked and to be timed: 8.4 and
# 12.6 s, and 2 s for the check. Rounded up to twice as much for the long ones, which a slower host makes longer.
AGGREGATION_S = {"fedavg": 40, "flora-na": 20, "als": 30}
LARGE = 1 << 30  # bytes of factors from which on rows need as long as those of W2
SLOW, ONCE = 0.5, 1.5  # seconds of a run from which on it is timed few times; from which on the first one counts
VECTORS = (("V1", 20, 25_000_000, torch.float32), ("V2", 64, 500_000_000, torch.bfloat16))


@dataclass(frozen=True)
class Bench:
    """Where rows go, and what they are measured on and against."""

    journal: Journal
    device: torch.device
    ceilings: Ceilings

    def row(self, name: str, work: Callable[[], dict[str, Any]], need_s: float) -> None:
        """Add what ``work`` finds."""
        self.journal.guard(name, work, need_s=need_s)

    def timed(self, run: Callable[[], Any], cost: Cost, *, most: int = 15, ran: bool = False) -> dict[str, Any]:
        """Seconds as a caller sees them, of the kernels alone and of the host alone, beside the floor.

        What has not ``ran`` yet runs once before: it may compile, for longer than it then takes.
        """
        if not ran:
            run()
        first = seconds(run, self.device)
        least = 1 if first > SLOW else 3
        t = Timing((first,)) if first > ONCE else measure_one(run, self.device, budget=0.5, least=least, most=most)
        row: dict[str, Any] = {"ok": True, "seconds": t.median, "runs": len(t.seconds)}
        if first <= ONCE:
            row |= {"host_s": host_seconds(run, self.device, least)}
            row |= kernel_times(run, self.device, least)
        floor, inside = self.ceilings.floor(cost), row.get("kernels_s")
        row |= {"floor_s": floor, "times_floor": t.median / floor, "bound": self.ceilings.bound(cost)}
        return row | ({"copy_share": cost.bytes / inside / self.ceilings.copy} if inside else {})


def end_to_end(journal: Journal, device: torch.device) -> None:
    """W1 and W2 from the device and from the host, V1 and V2, batches of duals."""
    bench = Bench(journal, device, ceilings_of(device))
    journal.add(name="ceilings", ok=True, **bench.ceilings.to_dict())
    gpu = device.type == "cuda"
    tiny = ((24, 20), (40, 20))
    w1 = Model("W1", ((W1.m, W1.n),) * W1.modules if gpu else tiny, 10, 8, torch.float32)
    # W2: a 7B Llama, all linear layers: 8 GB of factors
    w2 = Model("W2", LLAMA_BLOCK * 32 if gpu else tiny, 100 if gpu else 4, 16 if gpu else 2, torch.bfloat16)
    _model(bench, w1)
    for name, K, d, dtype in VECTORS:
        d = _fitting(K, d, dtype, device) if gpu else 400
        bench.row(f"{name} gradients", partial(_vectors, bench, name, K, d, dtype), 10)
        _release(device)
    bench.row("duals", lambda: _duals(device), 5)
    _model(bench, w2)


def _model(bench: Bench, model: Model) -> None:
    """Every method on one set of adapters; the operations by themselves; the stream from the host."""
    made: list[Pinned] = []

    def make() -> dict[str, Any]:
        made.append(Pinned(model.shapes, model.clients, model.rank, model.dtype, bench.device))
        return {"ok": True, "bytes": made[0].host.nbytes, "tensors": 2 * len(model.shapes) * model.clients}

    bench.row(f"{model.name} made", make, 20)
    if made:
        # as a row: what fails between its rows is told, and the workloads after it go on
        bench.row(f"{model.name} resident", partial(_resident, bench, model, made[0]), 0)
        _release(bench.device)


def _resident(bench: Bench, model: Model, pinned: Pinned) -> dict[str, Any]:
    slab, name = torch.empty_like(pinned.host, device=bench.device), model.name
    send = partial(slab.copy_, pinned.host, non_blocking=True)
    sent = measure_one(send, bench.device, budget=0.5).median
    bench.journal.add(name=f"{name} host to device", ok=True, seconds=sent, bytes_per_s=slab.nbytes / sent)
    clients, cost, w = pinned.layers(slab), pinned.cost(), sample_weights(model.clients)
    for op, run, its in _operations(clients, cost, bench.device):
        bench.row(f"{name} {op}", partial(bench.timed, run, its), 3)
    B, A = _sides(clients)
    f = kernels.prepare(B, A)
    for method in flora_na.batched.METHODS:
        run = partial(_held, f, w.to(bench.device), method)
        bench.row(f"{name} estimate_modules({method})", partial(_modules, bench, run, cost), 8)
        if bench.device.type == "cuda":
            bench.row(f"{name} estimate_modules({method}) replayed", partial(_replayed, bench, run, cost), 10)
    run = partial(_held, f, w.to(bench.device), "fedavg", precise=False)
    bench.row(f"{name} estimate_modules(fedavg, precise=False)", partial(_modules, bench, run, cost), 8)
    bench.row(f"{name} slab filled from the host", partial(_filled, bench, model, pinned, sent), 10)
    away = [Arriving(client, bench.device) for client in pinned.layers(pinned.host)]
    stream = partial(flora_na.aggregate, away, w, method="flora-na")
    large = slab.nbytes > LARGE
    bench.row(f"{name} streamed from the host", partial(_stream, stream, sent, bench.device), 40 if large else 10)
    for method, need_s in AGGREGATION_S.items():  # last: they take the longest, and may have to be left out
        run = partial(flora_na.aggregate, clients, w, method=method)
        work = partial(_aggregate, bench, run, clients, w, cost)
        bench.row(f"{name} aggregate({method})", work, need_s if large else 8)
    return {"ok": True}


def _aggregate(bench: Bench, run: Callable[[], Any], clients: Layers, w: Tensor, cost: Cost) -> dict[str, Any]:
    result, name = run(), next(iter(clients[0]))
    B, A = ([getattr(client[name], side) for client in clients] for side in "BA")
    mine = result.adapter.modules[name]
    true = relative_error(mine.B.double() @ mine.A.double() * mine.scaling, dense_update(B, A, w))
    claim, best = result.report.modules[name].rho, optimal_rho(B, A, w, mine.rank)
    right = abs(claim / true - 1) < 1e-3 and true >= best * (1 - 1e-3)
    row = bench.timed(run, cost, most=5, ran=True)
    return row | {"ok": right, "rho": true, "claimed_rho": claim, "optimal_rho": best}


def _sides(clients: Layers) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    B, A = ([[getattr(c[n], side) for c in clients] for n in clients[0]] for side in "BA")
    return B, A


def _held(f: kernels.PreparedFactors, w: Tensor, method: str, *, precise: bool = True) -> flora_na.BatchedEstimate:
    with f.held():
        return flora_na.estimate_modules(f.B, f.A, w, method=method, precise=precise)


def _modules(bench: Bench, run: Callable[[], flora_na.BatchedEstimate], cost: Cost) -> dict[str, Any]:
    """The device's way: rho where it calls it certain, held against ``||dW - BA||`` elsewhere (correctness)."""
    found = run()
    finite = all(bool(torch.isfinite(t).all()) for t in (*found.B, *found.A))
    row = bench.timed(run, cost, most=5, ran=True)
    evidence = {
        "rho": float(found.rho[0]), "certain": int(found.certain.sum()), "converged": int(found.converged.sum()),
        "modules": len(found.B), "most_sweeps": int(found.sweeps.max()),
    }  # fmt: skip
    return row | evidence | {"ok": finite}


def _replayed(bench: Bench, run: Callable[[], flora_na.BatchedEstimate], cost: Cost) -> dict[str, Any]:
    """The same as one CUDA graph: what the host spends is one launch."""
    side = torch.cuda.Stream(bench.device)
    side.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(side):
        plain = run()
    torch.cuda.current_stream(bench.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize(bench.device)
    same = all(torch.equal(x, y) for x, y in zip(plain.B + plain.A, captured.B + captured.A, strict=True))
    return bench.timed(graph.replay, cost, most=5, ran=True) | {"ok": same}


def _filled(bench: Bench, model: Model, pinned: Pinned, sent: float) -> dict[str, Any]:
    """Clients put into a slab one after the other as they arrive, then aggregated: from the host to one pair."""
    slab = kernels.FactorSlab(model.shapes, [model.rank] * model.clients, dtype=model.dtype, device=bench.device)
    clients, w = pinned.layers(pinned.host), sample_weights(model.clients).to(bench.device)

    def run() -> flora_na.BatchedEstimate:
        for u, client in enumerate(clients):
            slab.put(u, [layer.B for layer in client.values()], [layer.A for layer in client.values()])
        return _held(slab.factors, w, "fedavg")

    return _stream(run, sent, bench.device) | {"host_s": host_seconds(run, bench.device, 3)}


def _operations(clients: Layers, cost: Cost, device: torch.device) -> Iterator[tuple[str, Callable[[], Any], Cost]]:
    names = list(clients[0])
    B, A = _sides(clients)
    R, r = sum(b.shape[1] for b in B[0]), B[0][0].shape[1]
    P = [torch.randn(R, r, dtype=torch.float64, device=device) for _ in names]
    Q = [p.T.contiguous() for p in P]
    p = [torch.rand(len(clients), dtype=torch.float64, device=device) for _ in names]
    yield "factor_gram", lambda: kernels.factor_gram(B, A), cost
    blocks = replace(cost, flops=cost.flops * 2 * r / (R + 2 * r))
    yield "factor_combine(blocks)", lambda: kernels.factor_combine(B, A, P, Q), blocks
    yield "factor_combine(scalars)", lambda: kernels.factor_combine(B, A, p, p), replace(cost, flops=0)


def _stream(run: Callable[[], Any], sent: float, device: torch.device) -> dict[str, Any]:
    t = measure_one(run, device, budget=0.5, least=2, most=3)
    return {"ok": True, "seconds": t.median, "transfer_s": sent, "times_transfer": t.median / sent}


def _fitting(K: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """The length that two thirds of the free memory hold."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(d, int(free * 0.66 / ((K + 4) * dtype.itemsize)))


def _vectors(bench: Bench, name: str, K: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    lists = gradients(K, d, bench.device, dtype=dtype)
    v = torch.full((K,), 1 / K, dtype=torch.float64, device=bench.device)
    out = [torch.empty_like(t) for t in lists[0]]
    one, data, rate = d * dtype.itemsize, K * d * dtype.itemsize, rate_of(dtype, bench.device)
    for op, run, cost in (
        ("grad_gram", lambda: kernels.grad_gram(lists), Cost(d * K * K, data, data, rate)),
        ("grad_combine", lambda: kernels.grad_combine(lists, v, out=out), Cost(0, data + one, data, rate)),
        ("match", lambda: stamp.match_(out, lists, c=0.25), Cost(d * K * K, 2 * data + one, data, rate)),
    ):
        bench.row(f"{name} {op}", partial(bench.timed, run, cost), 3)
    found, truth = kernels.grad_gram(lists), gram_of(lists)
    error = relative_error(found.n0 + found.h[:, None] + found.h[None] + found.H, truth)
    return {"ok": error < 2e-6, "error": error, "tolerance": 2e-6, "K": K, "d": d, "bytes": data}


def _duals(device: torch.device) -> dict[str, Any]:
    """A thousand small duals at once on the device, beside the same on the CPU."""
    count, K = (1024, 20) if device.type == "cuda" else (3, 4)
    G = torch.stack([task_gramian(K, seed=s) for s in range(count)])
    there = G.to(device)
    batch = stamp.solve_dual(there, 0.25, method="batched")
    exact = stamp.solve_dual(G, 0.25, method="exact")
    gap = batch.relative_gap.max()  # type: ignore[union-attr]
    away = (batch.objective.cpu() / exact.objective - 1).abs().max()  # type: ignore[union-attr,operator]
    here = measure_one(lambda: stamp.solve_dual(there, 0.25, method="batched"), device, budget=0.5, most=10).median
    cpu = measure_one(lambda: stamp.solve_dual(G, 0.25, method="exact"), torch.device("cpu"), budget=0.5, most=3).median
    return {
        "ok": float(gap) <= 1e-9,
        "largest_gap": float(gap),
        "objective_off": float(away),
        "seconds": here,
        "cpu_s": cpu,
    }


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
