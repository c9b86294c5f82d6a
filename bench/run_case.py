"""One case from check to figures: wrong results are never timed against, and never praised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedgram.flora_na.report import json_number

from .ceilings import Ceilings
from .measure import Timing, interleave, synchronise
from .measure import seconds as seconds_of
from .registry import Case, Contender, Size, Target

Memory = Callable[[str], int]


COLD = 15.0  # seconds of a first run up to which a second one tells what a run takes


@dataclass(frozen=True)
class Checked:
    """What the check of one contender found."""

    error: float
    right: bool
    first_seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Budget:
    """How long contenders are timed: seconds each, and rounds at the fewest and the most."""

    seconds: float
    least: int
    most: int


BUDGETS: Mapping[Size, Budget] = {"full": Budget(1.5, 2, 25), "quick": Budget(0.5, 1, 9), "tiny": Budget(0.01, 1, 2)}


def check(case: Case, contender: Contender, device: torch.device) -> Checked:
    """Run once and compare with float64; where that was quick enough, run once more to see how long it takes."""
    results: list[Any] = []
    try:
        first = seconds_of(lambda: results.append(contender.run()), device)
        if first < COLD:  # the first run may have imported or compiled
            first = seconds_of(contender.run, device)
        error = float(case.error(contender.output(results[0])))
    except Exception as failure:  # a contender that fails is a row of the table, not the end of it
        if contender.kind == "ours":
            raise
        return Checked(math.nan, False, math.nan, reason(failure))
    synchronise(device)
    return Checked(error, math.isfinite(error) and error <= contender.tolerance, first)


def reason(failure: Exception) -> str:
    """An error on one line, with its type."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def refusal(case: Case, contender: Contender, checks: Mapping[str, Checked]) -> str:
    """Why no speed-up over this contender may be told, or an empty string."""
    ours, theirs = checks[case.ours.name], checks[contender.name]
    if theirs.failure:
        return f"failed: {theirs.failure}"
    if not ours.right:
        return f"our result is wrong ({ours.error:.1e} > {case.ours.tolerance:.0e})"
    if not theirs.right:
        return f"its result is wrong ({theirs.error:.1e} > {contender.tolerance:.0e})"
    return ""


def run_case(
    case: Case,
    size: Size,
    device: torch.device,
    ceilings: Ceilings | None,
    memory: Memory | None = None,
    budget: Budget | None = None,
    no_slow: str = "",
) -> dict[str, Any]:
    """Check every contender, time those that ran, and put the figures together (JSON-ready).

    ``no_slow`` is the reason why slow contenders are left out, if they are.
    """
    budget = budget or BUDGETS[size]
    left_out = {c.name: f"left out: {no_slow}" for c in case.contenders if c.slow and no_slow}
    contenders = [c for c in case.contenders if c.name not in left_out]
    checks = {c.name: check(case, c, device) for c in contenders}
    runs = {c.name: c.run for c in contenders if not checks[c.name].failure}
    known = {name: checks[name].first_seconds for name in runs}
    timings = interleave(runs, device, budget=budget.seconds, least=budget.least, most=budget.most, known=known)
    peaks, unknown = _peaks([c.name for c in contenders if c.memory and c.name in runs], memory)
    rows = [_row(case, c, checks, timings, peaks, ceilings) for c in contenders]
    figures = {r["name"]: r for r in rows}
    return {
        "workload": case.workload,
        "error_is": case.measures,
        "cost": None if case.cost is None else vars(case.cost),
        "floor_s": None if case.cost is None or ceilings is None else ceilings.floor(case.cost),
        "bound": None if case.cost is None or ceilings is None else ceilings.bound(case.cost),
        "contenders": rows,
        "missing": {**case.missing, **left_out, **unknown},
        "targets": [_judge(t, case.ours.name, figures) for t in case.targets] if size == "full" else [],
    }


def _peaks(names: Iterable[str], memory: Memory | None) -> tuple[dict[str, int], dict[str, str]]:
    """Peaks by contender, and why those that could not be measured are not there."""
    peaks: dict[str, int] = {}
    unknown: dict[str, str] = {}
    if memory is None:
        return peaks, unknown
    for name in names:
        try:
            peaks[name] = memory(name)
        except Exception as failure:  # a figure that is missing, no more
            unknown[f"memory of {name}"] = f"not measured: {reason(failure)}"
    return peaks, unknown


def _row(
    case: Case,
    contender: Contender,
    checks: Mapping[str, Checked],
    timings: Mapping[str, Timing],
    peaks: Mapping[str, int],
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    name, checked, ours = contender.name, checks[contender.name], case.ours.name
    row: dict[str, Any] = {
        "name": name,
        "kind": contender.kind,
        "error": json_number(checked.error),
        "tolerance": json_number(contender.tolerance),
        "right": checked.right,
        "note": contender.note,
        "peak_bytes": peaks.get(name),
        "refused": "" if name == ours else refusal(case, contender, checks),
        "speed_up": None,
    }
    if name not in timings:
        return row | {"runs": 0, "median_s": None, "q1_s": None, "q3_s": None}
    timing = timings[name]
    q = timing.quartiles
    row |= {"runs": len(timing.seconds), "inner": timing.inner, "median_s": q.median, "q1_s": q.q1, "q3_s": q.q3}
    if case.cost is not None and ceilings is not None:
        row |= {"times_floor": q.median / ceilings.floor(case.cost), "reads": ceilings.reads(q.median, case.cost)}
    if name != ours and not row["refused"]:
        row["speed_up"] = asdict(timings[ours].ratio(timing))
    return row


def _judge(target: Target, ours: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A target with what was reached; ``met`` is None where it could not be measured."""
    mine, other = rows[ours], rows.get(target.against)
    reached: float | None = None
    if target.measure == "speed-up" and other and other["speed_up"]:
        reached = other["speed_up"]["median"]
    elif target.measure == "seconds":
        reached = mine["median_s"]
    elif target.measure == "reads":
        reached = mine.get("reads")
    elif target.measure == "memory_mb" and mine["peak_bytes"] is not None:
        reached = mine["peak_bytes"] / 1e6
    elif target.measure == "memory-ratio" and other and mine["peak_bytes"] is not None and other["peak_bytes"]:
        reached = other["peak_bytes"] / max(mine["peak_bytes"], 1)
    at_least = target.measure in ("speed-up", "memory-ratio")
    met = None
    if reached is not None:
        met = mine["right"] and (reached >= target.value if at_least else reached <= target.value)
    return {"measure": target.measure, "against": target.against, "bound": target.value, "reached": reached, "met": met}
