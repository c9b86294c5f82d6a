"""The GPU script's checks of whole computations: what estimators and matching return from a GPU, against the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedgram import flora_na, stamp
from fedgram.flora_na import Adapter, LoraLayer

from .gpu_support import Journal, poisoned
from .reference import list_error, relative_error, worst
from .workloads import gradients, name_of

PAIR = 2e-5  # of the products of float32 factors, whose rounding and tf32x3 products are 1e-6 each, through a solve
RHO = 1e-3  # three digits
Numbers = dict[str, Tensor | float]


@dataclass(frozen=True)
class Cohort:
    """Modules (m, n), the clients' ranks, and their type."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    scalings: tuple[float, ...] = (2.0, 1.0, -0.5, 1.0)  # of the clients in turn


SHAPES, RANKS = ((96, 64), (40, 130), (96, 64)), (4, 8, 3, 8)
COHORTS = (  # Grams solved on the host, on the device, and never formed; scalings of one leave weights shared
    Cohort("small", SHAPES, RANKS, torch.float32),
    Cohort("small", SHAPES, RANKS, torch.bfloat16),
    Cohort("unscaled", SHAPES, RANKS, torch.float32, (1.0,)),
    Cohort("large", ((1000, 900), (600, 1000)), (16,) * 40, torch.float32),
    Cohort("large", ((1000, 900), (600, 1000)), (16,) * 40, torch.bfloat16),
    Cohort("implicit", ((300, 200),), (16,) * 40, torch.float32),
)


def unequal_factors(device: torch.device) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Two modules of three clients of unequal rank."""
    random = torch.Generator().manual_seed(5)
    shapes, ranks = ((64, 48), (33, 20)), (4, 8, 3)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    return [[made(m, r) for r in ranks] for m, _ in shapes], [[made(r, n) for r in ranks] for _, n in shapes]


def estimates(journal: Journal, device: torch.device) -> None:
    """``estimate_modules`` against dense products, and everything else against the same call on the CPU."""
    for method in flora_na.batched.METHODS:
        journal.guard(f"estimate_modules({method})", partial(_estimated, method, device))
    for cohort in COHORTS if device.type == "cuda" else COHORTS[:2]:
        clients, previous = _adapters(cohort), _adapters(cohort, seed=9)[0]
        for name, call in _aggregations(previous).items():
            if "anchor" in name and len(cohort.ranks) > len(RANKS):
                continue  # the same operations, minutes on the CPU
            label = f"{name} {cohort.name} {name_of(cohort.dtype)}"
            journal.guard(label, partial(_compared, call, clients, device, cohort.dtype), need_s=3)
    for name, match in _matches().items():
        journal.guard(name, partial(_matched, match, device))


def _estimated(method: str, device: torch.device) -> dict[str, Any]:
    """The rho that is claimed, and that of ``estimate``, against dense float64 products."""
    B, A = unequal_factors(device)
    weights = torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64, device=device)
    with poisoned():
        found = flora_na.estimate_modules(B, A, weights, method=method, sweeps=60, backend="triton")
    errors, lags = [], []
    for l, (bs, as_) in enumerate(zip(B, A, strict=True)):
        w = weights / weights.sum()
        dense = sum(x * b.double() @ a.double() for x, b, a in zip(w, bs, as_, strict=True))
        true = float((dense - found.B[l].double() @ found.A[l].double()).norm() / dense.norm())
        errors.append(abs(float(found.rho[l]) / true - 1))
        lags.append(true / flora_na.estimate(bs, as_, weights.cpu(), method=method).rho - 1)
    error, behind = worst(errors), worst(lags)
    certain = bool(found.certain.all())
    right = error <= RHO and behind <= RHO and certain
    row = {"ok": right, "error": error, "tolerance": RHO, "behind_estimate": behind, "certain": certain}
    return {"op": "estimate_modules", **row}


def _adapters(cohort: Cohort, seed: int = 3) -> list[Adapter]:
    """The clients' adapters, on the CPU, with scalings of their own."""
    random = torch.Generator().manual_seed(seed)
    common = [(torch.randn(m, 64, generator=random), torch.randn(64, n, generator=random)) for m, n in cohort.shapes]
    clients = []
    for u, rank in enumerate(cohort.ranks):
        layers = {}
        for l, (B, A) in enumerate(common):
            b = B[:, :rank] + torch.randn(B[:, :rank].shape, generator=random)
            a = A[:rank] + torch.randn(A[:rank].shape, generator=random)
            scaling = cohort.scalings[u % len(cohort.scalings)]
            layers[f"layer{l}"] = LoraLayer(A=a.to(cohort.dtype), B=b.to(cohort.dtype), scaling=scaling)
        clients.append(Adapter(layers))
    return clients


def _on(adapter: Adapter, device: torch.device) -> Adapter:
    return Adapter(
        {n: LoraLayer(A=x.A.to(device), B=x.B.to(device), scaling=x.scaling) for n, x in adapter.modules.items()}
    )


def _aggregations(previous: Adapter) -> dict[str, Callable[[Sequence[Adapter], torch.device], Numbers]]:
    """Calls over clients on a device; ``previous`` is last round's adapter, on the CPU."""

    def whole(clients: Sequence[Adapter], device: torch.device, **options: Any) -> Numbers:
        for name in ("anchor", "align_to"):
            if name in options:
                options[name] = _on(previous, device)
        result = flora_na.aggregate(clients, [1.0 + u % 4 for u in range(len(clients))], **options)
        found: Numbers = {}
        for name, layer in result.adapter.modules.items():
            report = result.report.modules[name]
            found[f"pair {name}"] = (layer.B.double() @ layer.A.double()).cpu()
            found |= {
                f"rho {name}": report.rho,
                f"fedavg {name}": report.rho_fedavg,
                f"best {name}": report.rho_optimal,
            }
        return found

    def gramian(clients: Sequence[Adapter], device: torch.device) -> Numbers:
        return {"pair": flora_na.client_gramian(clients).cpu()}

    chosen: dict[str, dict[str, Any]] = {
        f"aggregate({m})": {"method": m} for m in ("fedavg", "flora-na", "als", "svd", "stack")
    }
    chosen["aggregate(flora-na, anchor)"] = {"method": "flora-na", "anchor": True}
    chosen["aggregate(als, aligned)"] = {"method": "als", "align_to": True}
    chosen["aggregate(svd, rank auto)"] = {"method": "svd", "rank": "auto:0.9"}
    chosen["aggregate(fedavg, rank 2, screened)"] = {"method": "fedavg", "rank": 2, "clip": "1x", "min_cosine": -0.9}
    return {name: partial(whole, **options) for name, options in chosen.items()} | {"client_gramian": gramian}


def _compared(
    call: Callable[[Sequence[Adapter], torch.device], Numbers], clients: Sequence[Adapter], device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    expected = call(clients, torch.device("cpu"))
    found = call([_on(c, device) for c in clients], device)
    pairs, rhos = [], []
    for name, value in expected.items():
        mine = found[name]
        if isinstance(value, Tensor):
            assert isinstance(mine, Tensor)
            pairs.append(relative_error(mine, value))
        else:
            rhos.append(abs(float(mine) - value) / max(value, 1e-6))
    pair, rho = worst(pairs), worst(rhos)
    # where a bfloat16 factor lies between two numbers the last bit decides which it becomes
    tolerance = PAIR if dtype == torch.float32 else 4e-3
    right = pair <= tolerance and rho <= RHO
    return {"op": "aggregate", "ok": right, "error": pair, "tolerance": tolerance, "rho_error": rho}


def _matches() -> dict[str, Callable[[list[list[Tensor]]], stamp.Match]]:
    return {f"match precise={p}": partial(stamp.match, c=0.4, precise=p) for p in (True, False)}


def _matched(call: Callable[[list[list[Tensor]]], stamp.Match], device: torch.device) -> dict[str, Any]:
    lists = gradients(5, 20_000, torch.device("cpu"))
    expected, found = call(lists), call([[t.to(device) for t in one] for one in lists])
    error = list_error([t.cpu() for t in found.direction], expected.direction)
    right = error <= PAIR and found.status == "optimal"
    return {"op": "match", "ok": right, "error": error, "tolerance": PAIR, "relative_gap": found.relative_gap}
