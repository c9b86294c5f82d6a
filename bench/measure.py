"""Timing: interleaved runs of all contenders, adaptive counts, medians and quartiles of the paired ratios."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
SHORTEST = 5e-3  # one sample lasts at least this long: shorter runs are repeated inside it
MOST_INNER = 200
ENDLESS = 10  # budgets


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some figures."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        """Of one value or more (of one, all three are that value)."""
        if len(values) == 1:
            return Quartiles(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return Quartiles(median, q1, q3)


@dataclass(frozen=True)
class Timing:
    """Seconds per run of one contender, one number per round; of ``inner`` runs in one sample it is the mean."""

    seconds: tuple[float, ...]
    inner: int = 1

    @property
    def quartiles(self) -> Quartiles:
        """Of the seconds."""
        return Quartiles.of(self.seconds)

    @property
    def median(self) -> float:
        """Of the seconds."""
        return self.quartiles.median

    def ratio(self, other: Timing) -> Quartiles:
        """How many times longer ``other`` takes, from the rounds in which both ran."""
        return Quartiles.of([b / a for a, b in zip(self.seconds, other.seconds, strict=False)])


@dataclass(frozen=True)
class Plan:
    """How often one contender runs."""

    rounds: int
    inner: int


def plan(first: float, budget: float, least: int, most: int) -> Plan:
    """Runs for a contender whose warm run took ``first`` seconds, within ``budget`` seconds."""
    inner = min(MOST_INNER, math.ceil(SHORTEST / max(first, 1e-9)))
    return Plan(min(most, max(least, int(budget / max(first * inner, 1e-9)))), inner)


def interleave(
    runs: Mapping[str, Run],
    device: torch.device,
    *,
    budget: float = 3.0,
    least: int = 2,
    most: int = 25,
    known: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time all contenders in turns, so that whatever else the machine does meets them alike.

    Rounds follow each other in opposite orders; a contender leaves after as many as its ``budget`` seconds allow,
    ``least`` at the fewest. Every contender runs without counting first, except slow ones that just did: ``known``
    has the seconds of a run that went before (the check). Where that took more than ``ENDLESS`` budgets, it counts and
    no other follows. Runs shorter than ``SHORTEST`` are measured with warm caches.
    """
    known = known or {}
    endless = {name: took for name, took in known.items() if took > ENDLESS * budget}
    samples: dict[str, list[float]] = {name: [endless[name]] if name in endless else [] for name in runs}
    plans = {
        name: Plan(0, 1) if name in endless else _plan(run, device, known.get(name), budget, least, most)
        for name, run in runs.items()
    }
    with _no_collector():
        for i in range(max(p.rounds for p in plans.values())):
            order = list(runs) if i % 2 == 0 else list(runs)[::-1]
            for name in order:
                if i < plans[name].rounds:
                    samples[name].append(_sample(runs[name], device, plans[name].inner))
    return {name: Timing(tuple(values), plans[name].inner) for name, values in samples.items()}


def _plan(run: Run, device: torch.device, known: float | None, budget: float, least: int, most: int) -> Plan:
    if known is not None and known > budget / 2:
        return plan(known, budget, least, most)
    if known is None:
        seconds(run, device)
    return plan(seconds(run, device), budget, least, most)


def _sample(run: Run, device: torch.device, inner: int) -> float:
    if inner > 1:
        run()
    return seconds(run, device, inner)


def measure_one(run: Run, device: torch.device, *, budget: float = 1.0, least: int = 3, most: int = 100) -> Timing:
    """Time one run by itself."""
    return interleave({"": run}, device, budget=budget, least=least, most=most)[""]


def seconds(run: Run, device: torch.device, inner: int = 1) -> float:
    """Seconds of one run, the mean of ``inner`` in a row; waits for the device before and after."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(inner):
        run()
    synchronise(device)
    return (time.perf_counter() - start) / inner


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
