"""FLoRA-NA's entries: single modules against gradient loops and dense decompositions, and whole adapter sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedgram import flora_na
from fedgram.flora_na import Aggregation, Estimate

from .ceilings import Cost, rate_of
from .peers import adamw, dense, peft_merge
from .peers.operations import weighted_sum
from .reference import dense_update, gram_of, optimal_rho, relative_error, rho, scalar_rho, worst
from .registry import Case, Contender, Size, Target, entry, with_peers
from .workloads import TINY, W1, Lora, adapters, factors, sample_weights

CLAIM = 1e-3  # relative, of a claimed rho: three digits
# svd is held to a rho within 1e-6 (relative) of the optimum. als and flora-na are solved to more digits than
# that on Gram matrices in float64, and float32 output adds less.
OPTIMUM = 1e-6
ITERATED = math.inf  # a gradient loop ends where it ends: its error is shown beside ours, which has its own bound


def estimate_cost(size: Lora, device: torch.device) -> Cost:
    """Reading the factors, two Gram matrices by symmetry, writing one pair."""
    R = size.total_rank
    pair = size.modules * size.rank * (size.m + size.n) * size.dtype.itemsize
    flops = size.modules * (size.m + size.n) * R * (R + 2 * size.rank)
    return Cost(flops, size.bytes + pair, size.bytes, rate_of(size.dtype, device))


@entry("estimate-flora-na", "flora_na", gpu=True)
def estimate_flora_na(size: Size, device: torch.device) -> Case:
    """One module, scalar coefficients, against the authors' way to find them."""
    lora = replace(TINY, modules=1) if size == "tiny" else Lora(1, 10, 1024, 1024, 8)
    (B,), (A,) = factors(lora, device)
    w = sample_weights(lora.clients)
    steps = {"full": 200, "quick": 200, "tiny": 20}[size]
    dW = dense_update(B, A, w)
    truth = scalar_rho(B, A, w)

    def excess(result: Any) -> float:
        """rho over that of the float64 optimum, minus 1; Inf where a claimed rho is off."""
        pair = (result.B, result.A) if isinstance(result, Estimate) else result
        true = rho(pair, dW)
        if isinstance(result, Estimate) and not abs(result.rho / true - 1) <= CLAIM:
            return math.inf
        return true / truth - 1

    run = partial(flora_na.estimate, B, A, w, method="flora-na")
    loop, tuned = f"{steps} AdamW steps on dense products", f"{steps} AdamW steps, target formed once"
    peer = partial(adamw.adamw_scalars, B, A, w, steps=steps)
    contenders = [
        Contender("estimate(flora-na)", run, "ours", OPTIMUM),
        Contender(loop, partial(peer, tuned=False), "peer", ITERATED, slow=True),
        Contender(tuned, peer, "peer", ITERATED, slow=True),
        Contender(
            "averaged factors", partial(dense.average, B, A, w), "torch", ITERATED, note="FedAvg: another answer"
        ),
    ]
    targets = (Target("speed-up", 1000, loop),)
    return Case(str(lora), contenders, excess, "rho over the float64 optimum", estimate_cost(lora, device), targets)


@entry("estimate-svd", "flora_na", gpu=True)
def estimate_svd(size: Size, device: torch.device) -> Case:
    """One module, the best pair of a rank, against decompositions of the dense sum."""
    sizes = {"full": Lora(1, 10, 2048, 2048, 16), "quick": Lora(1, 10, 1024, 1024, 16), "tiny": Lora(1, 3, 24, 24, 2)}
    lora = sizes[size]
    (B,), (A,) = factors(lora, device)
    w, r = sample_weights(lora.clients), lora.rank
    dW, truth = dense_update(B, A, w), optimal_rho(B, A, w, lora.rank)

    def excess(result: Any) -> float:
        return rho((result.B, result.A) if isinstance(result, Estimate) else result, dW) / truth - 1

    # float32 decompositions get the same bound as ours
    def peft() -> Contender:
        merge, pair = peft_merge.add_weighted_adapter(B, A, w, r)
        return Contender(peft_merge.NAME, merge, "peer", OPTIMUM, pair, slow=True)

    ours = [
        Contender("estimate(svd)", partial(flora_na.estimate, B, A, w, method="svd"), "ours", OPTIMUM),
        Contender("estimate(als)", partial(flora_na.estimate, B, A, w, method="als"), "ours", OPTIMUM),
        Contender("dense sum + svd", partial(dense.dense_svd, B, A, w, r), "torch", OPTIMUM, slow=True),
        Contender("cat + QR + svd", partial(dense.qr_svd, B, A, w, r), "torch", OPTIMUM),
    ]
    contenders, missing = with_peers(ours, peft)
    targets = (Target("speed-up", 100, peft_merge.NAME),)
    return Case(str(lora), contenders, excess, "rho over the optimum", estimate_cost(lora, device), targets, missing)


class AdapterSet:
    """A whole adapter set, its float64 truths, and the check of an aggregate of it."""

    def __init__(self, size: Size, device: torch.device) -> None:
        small = replace(W1, modules=6)
        self.lora = {"full": W1, "quick": small, "tiny": TINY}[size]
        self.B, self.A = factors(self.lora, device)
        self.clients = adapters(self.lora, device)
        self.w = sample_weights(self.lora.clients)

    def excess(self, truth: Callable[..., float], checked: int | None = None) -> Callable[[Any], float]:
        """The largest excess of rho over ``truth(B, A, w)``; in every module claims of rho must hold.

        A truth that is slow to find is compared with in ``checked`` modules only, the first and the last among them.
        """
        modules = range(self.lora.modules)
        chosen = modules if checked is None else spread(self.lora.modules, checked)
        truths = {l: truth(self.B[l], self.A[l], self.w) for l in chosen}

        def module_error(result: Any, l: int) -> float:
            true = rho(pair_at(result, l), dense_update(self.B[l], self.A[l], self.w))
            if isinstance(result, Aggregation):
                claim = result.report.modules[f"layer{l}"].rho
                if not abs(claim / true - 1) <= CLAIM:
                    return math.inf
            return true / truths.get(l, true) - 1

        return lambda result: worst(module_error(result, l) for l in modules)

    def aggregate(self, method: str, *, everything: bool = False) -> Callable[[], Aggregation]:
        """A run of ``aggregate``; with ``everything`` the report's yardsticks as well."""

        def run() -> Aggregation:
            result = flora_na.aggregate(self.clients, self.w, method=method)
            if everything:
                result.report.to_dict()
            return result

        return run

    def each(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], list[Any]]:
        """A run of a function of one module over all of them."""
        return lambda: [function(bs, as_, self.w, *arguments) for bs, as_ in zip(self.B, self.A, strict=True)]


def spread(count: int, chosen: int) -> list[int]:
    """At most ``chosen`` (two or more) of the numbers below ``count``, evenly, the first and the last among them."""
    return sorted({round(i * (count - 1) / (chosen - 1)) for i in range(chosen)})


def pair_at(result: Any, module: int) -> tuple[Tensor, Tensor]:
    """Module ``module`` of an aggregation, or of a list of pairs."""
    if not isinstance(result, Aggregation):
        return result[module]
    layer = result.adapter.modules[f"layer{module}"]
    return layer.B * layer.scaling, layer.A


@entry("aggregate-als", "flora_na", gpu=True)
def aggregate_als(size: Size, device: torch.device) -> Case:
    """A whole adapter set with the default method, its rho and both yardsticks included."""
    data = AdapterSet(size, device)
    rank = data.lora.rank
    error = data.excess(lambda B, A, w: optimal_rho(B, A, w, rank))
    contenders = [
        Contender("aggregate(als) + all rho", data.aggregate("als", everything=True), "ours", OPTIMUM),
        Contender("cat + QR + svd per module", data.each(dense.qr_svd, rank), "torch", OPTIMUM, note="no rho"),
    ]
    return Case(
        f"W1: {data.lora}" if size == "full" else str(data.lora), contenders, error, "rho over the optimum",
        estimate_cost(data.lora, device), (Target("seconds", 0.5),),
    )  # fmt: skip


@entry("aggregate-flora-na", "flora_na", gpu=True)
def aggregate_flora_na(size: Size, device: torch.device) -> Case:
    """A whole adapter set, scalar coefficients, in reads of the data."""
    data = AdapterSet(size, device)
    ours = Contender("aggregate(flora-na)", data.aggregate("flora-na"), "ours", OPTIMUM)
    average = Contender("averaged factors", data.each(dense.average), "torch", ITERATED, note="FedAvg: another answer")
    return Case(
        str(data.lora), [ours, average], data.excess(scalar_rho, 3), "rho over the float64 optimum",
        estimate_cost(data.lora, device), (Target("reads", 4),),
    )  # fmt: skip


@entry("aggregate-fedavg", "flora_na", gpu=True)
def aggregate_fedavg(size: Size, device: torch.device) -> Case:
    """A whole adapter set, averaged, with rho, in reads of the data."""
    data = AdapterSet(size, device)
    sides = zip(data.B, data.A, strict=True)
    means = [tuple(torch.tensordot(data.w, torch.stack(x).double().cpu(), 1) for x in pair) for pair in sides]

    def error(result: Any) -> float:
        pairs = [pair_at(result, l) for l in range(data.lora.modules)]
        return worst(
            relative_error(x.cpu(), y) for p, t in zip(pairs, means, strict=True) for x, y in zip(p, t, strict=True)
        )

    ours = Contender("aggregate(fedavg) + rho", data.aggregate("fedavg"), "ours", 1e-6)
    # ten products and sums, each rounded to float32
    loop = Contender("loop over clients", data.each(dense.average), "torch", 1e-6, note="no rho")
    return Case(
        str(data.lora), [ours, loop], error, "relative error of the averages",
        estimate_cost(data.lora, device), (Target("reads", 4),),
    )  # fmt: skip


@entry("client-gramian", "flora_na", gpu=True)
def client_gramian(size: Size, device: torch.device) -> Case:
    """Inner products of the clients' whole updates in weight space."""
    data = AdapterSet(size, device)
    modules = zip(data.B, data.A, strict=True)
    grams = [gram_of([[b.double() @ a.double()] for b, a in zip(bs, as_, strict=True)]) for bs, as_ in modules]
    truth = torch.stack(grams).sum(0)
    # dense: float32 chains over 1e6 products in each module
    contenders = [
        Contender("client_gramian", partial(flora_na.client_gramian, data.clients), "ours", 2e-6),
        Contender("dense products + Gram", partial(dense.dense_client_gramian, data.B, data.A), "torch", 1e-3),
    ]
    return Case(
        str(data.lora),
        contenders,
        lambda G: relative_error(G, truth),
        "relative error of G",
        estimate_cost(data.lora, device),
    )


@entry("exact-residual", "flora_na", gpu=True)
def exact_residual(size: Size, device: torch.device) -> Case:
    """What averaged factors miss (FedEx-LoRA): kept factored here, dense there."""
    lora = replace(TINY, modules=1) if size == "tiny" else Lora(1, 10, 2048, 2048, 16)
    (B,), (A,) = factors(lora, device)
    w = sample_weights(lora.clients)
    truth = dense_update(B, A, w) - (
        weighted_sum(w.tolist(), (b.double() for b in B)) @ weighted_sum(w.tolist(), (a.double() for a in A))
    )

    def factored() -> tuple[Tensor, Tensor]:
        return flora_na.estimate(B, A, w, method="fedavg").residual()

    contenders = [
        Contender("estimate(fedavg).residual()", factored, "ours", 1e-5, lambda p: p[0].double() @ p[1].double()),
        Contender("FedEx-style dense residual", partial(dense.dense_residual, B, A, w), "peer", 1e-5),
    ]
    return Case(
        str(lora),
        contenders,
        lambda R: relative_error(R, truth),
        "relative error of the residual",
        estimate_cost(lora, device),
    )
