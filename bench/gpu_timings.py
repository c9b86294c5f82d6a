"""The GPU script's timings: the registry's entries against their floors and their peers."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch

from .ceilings import Ceilings, measure_ceilings
from .gpu_support import Journal, host_seconds, kernel_times
from .registry import Entry, Size, entries
from .run_case import Budget, run_case

BUDGET = Budget(0.25, 2, 25)


def ceilings_of(device: torch.device) -> Ceilings:
    """The device's rates, measured in this process."""
    small = device.type == "cpu"
    return measure_ceilings(device, scale=0.001 if small else 1.0, seconds=0.002 if small else 0.3)


def timings(journal: Journal, device: torch.device) -> None:
    """Every entry that is worth a GPU: checked, timed in turns with its peers, beside the time of its kernels."""
    ceilings = ceilings_of(device)
    journal.add(name="ceilings", ok=True, **ceilings.to_dict())
    chosen = entries(gpu=True) if device.type == "cuda" else entries(["factor_gram-bf16", "grad_combine"], gpu=True)
    for entry in chosen:
        journal.guard(entry.name, partial(_entry, entry, device, ceilings), need_s=3)
        gc.collect()


def _entry(entry: Entry, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    size: Size = "full" if device.type == "cuda" else "tiny"
    case = entry.build(size, device)
    figures = run_case(case, size, device, ceilings, budget=BUDGET if size == "full" else None)
    mine = figures["contenders"][0]
    figures |= kernel_times(case.ours.run, device) | {"host_s": host_seconds(case.ours.run, device)}
    inside = figures.get("kernels_s")
    if case.cost is not None and inside:
        figures |= {"kernels_times_floor": inside / ceilings.floor(case.cost)}
        figures |= {"copy_share": case.cost.bytes / inside / ceilings.copy}
    slower = [r["name"] for r in figures["contenders"][1:] if r["speed_up"] and r["speed_up"]["median"] < 0.95]
    return {"ok": mine["right"], "slower_than": slower, **figures}
