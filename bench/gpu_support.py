"""What the GPU script needs: rows written as they come, poisoned memory, layouts that provoke, kernel times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import written_whole
from .measure import synchronise

SENTINEL = 7.0
LONGEST = 8  # kernels that are told by name
UNKILLED = 5.0  # seconds within which the system ends what it can end
NOT_ENDED = ", and could not be ended"
MARGIN = 3  # elements or rows around a provoking layout


@dataclass
class Journal:
    """One section's rows, on disk after every one of them: a crash loses nothing that was found before it."""

    path: Path | None
    deadline: float = float("inf")
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        """Append a row and write all."""
        self.rows.append(row)
        if self.path is not None:
            with written_whole(self.path) as unfinished:
                unfinished.write_text(json.dumps(self.rows, default=str))

    def guard(self, name: str, work: Callable[[], dict[str, Any]], *, need_s: float = 0.0) -> None:
        """Add what ``work`` returns, or its error in full, or that time is too short for it."""
        if time.monotonic() + need_s > self.deadline:
            self.add(name=name, ok=None, skipped="out of time")
            return
        start = time.perf_counter()
        try:
            row = work()
        except Exception as error:  # recorded in full: the script's purpose is to find such things
            row = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        self.add(name=name, **row, took_s=round(time.perf_counter() - start, 3))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``torch.empty`` and its kin return with NaN: an element that a kernel does not write shows."""
    kept = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
    new_empty = Tensor.new_empty

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            t = make(*arguments, **options)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return run

    for name, make in kept.items():
        setattr(torch, name, filled(make))
    Tensor.new_empty = filled(new_empty)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(torch, name, make)
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


LAYOUTS = ("plain", "misaligned", "sliced", "transposed")


def laid(t: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory; whatever lies around them is NaN, so that a stray read shows."""
    if layout == "plain":
        return t.contiguous()
    if layout == "misaligned":  # one element off any alignment
        room = t.new_full((t.numel() + 2 * MARGIN,), torch.nan)
        return room[1 : 1 + t.numel()].view(t.shape).copy_(t)
    if layout == "sliced":  # rows of a wider matrix
        shape = (*t.shape[:-1], t.shape[-1] + 2 * MARGIN) if t.ndim else (1,)
        room = t.new_full(shape, torch.nan)
        return (room[..., MARGIN:-MARGIN] if t.ndim else room[0]).copy_(t)
    if layout == "transposed":  # columns contiguous
        return t.new_empty(t.shape[::-1]).copy_(t.T).T if t.ndim == 2 else t.clone()
    raise ValueError(f"layout: unknown {layout!r}")


@dataclass(frozen=True)
class Guarded:
    """An output with sentinels around it."""

    room: Tensor
    view: Tensor

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Guarded:
        """An output of a shape, inside a larger tensor of sentinels; its own elements are NaN."""
        room = torch.full([n + 2 * MARGIN for n in shape] or [1], SENTINEL, dtype=dtype, device=device)
        view = room[tuple(slice(MARGIN, MARGIN + n) for n in shape)] if len(shape) else room[0]
        view.fill_(torch.nan)
        return Guarded(room, view)

    def untouched(self) -> bool:
        """Whether all sentinels are still there."""
        outside = torch.ones_like(self.room, dtype=torch.bool)
        outside[tuple(slice(MARGIN, MARGIN + n) for n in self.view.shape) if self.view.ndim else 0] = False
        return bool((self.room[outside] == SENTINEL).all())


def end_groups(processes: Collection[subprocess.Popen[Any]], grace: float = 5.0) -> list[subprocess.Popen[Any]]:
    """End processes and their groups, all together: asked first, so that they can end the groups that they have made.

    Returns those that are still there ``UNKILLED`` seconds after they were killed: stuck in a driver, say.
    """
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, UNKILLED)):
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + patience
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    return [process for process in processes if process.poll() is None]


def kernel_times(run: Callable[[], Any], device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """``kernels_s``, the seconds that the GPU computes in one run (gaps between launches left out), and ``kernels``,
    the longest of them by name with their number; nothing where no profiler works."""
    if device.type != "cuda":
        return {}
    try:
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(repeats):
                run()
            torch.cuda.synchronize()
        events = list(trace.key_averages())
    except Exception as error:  # a profiler that cannot start costs columns, no more
        return {"profiler": f"{type(error).__name__}: {error}"}
    times: dict[str, list[float]] = {}
    for e in events:
        sums = times.setdefault(e.key[:60], [0.0, 0.0])
        sums[0] += e.self_device_time_total * 1e-6 / repeats
        sums[1] += e.count / repeats
    total = sum(seconds for seconds, _ in times.values())
    longest = sorted((n for n in times if times[n][0] > 0), key=lambda n: -times[n][0])[:LONGEST]
    return {"kernels_s": total, "kernels": {n: times[n] for n in longest}} if total else {}


def host_seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median seconds until the call returns, the device not waited for: what the host itself spends."""
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    synchronise(device)
    return sorted(times)[len(times) // 2]
