"""The GPU script's sweep of compile-time choices: those that are shipped beside those that may come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fedgram import kernels
from fedgram.kernels.trials import trials, trying

from .gpu_support import Journal, kernel_times
from .measure import measure_one
from .reference import dense_update, relative_error
from .workloads import TINY, Lora, even_offsets, factors, layer_rows, name_of, sample_weights

GHOSTS = ((32, 512), (8, 1024), (8, 4096))  # tasks and rows of a layer of 2048 x 2048
CLIENTS = (10, 1)  # added to a weight of 4096 x 4096, rank 16
Case = tuple[str, torch.dtype, str, float, Callable[[], Tensor], Tensor]


def choices(journal: Journal, device: torch.device) -> None:
    """The seconds of each choice, its kernels' among them; errors against float64."""
    for op, dtype, workload, tolerance, run, truth in _cases(device):
        for trial in ("", *trials(op, dtype)):
            work = partial(_tried, op, dtype, trial, tolerance, run, truth, device)
            journal.guard(f"{op} {workload} {name_of(dtype)}, {trial or 'shipped'}", work, need_s=4)


def _tried(
    op: str, dtype: torch.dtype, trial: str, tolerance: float, run: Callable[[], Tensor], truth: Tensor,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    with trying(op, dtype, trial) if trial else nullcontext():
        error = relative_error(run(), truth)
        took = measure_one(run, device, budget=0.2 if device.type == "cuda" else 0.005, most=20).median
        inside = kernel_times(run, device)
    return {"op": op, "ok": error <= tolerance, "error": error, "tolerance": tolerance, "seconds": took, **inside}


def _cases(device: torch.device) -> Iterator[Case]:
    """Operation, type, sizes, tolerance, call, and what it gives in float64."""
    gpu = device.type == "cuda"
    for tasks, rows in GHOSTS if gpu else ((3, 40),):
        for dtype in (torch.float32, torch.bfloat16):
            a, d = (t.to(dtype) for t in layer_rows(tasks, rows, *((2048, 2048) if gpu else (20, 24)), device))
            offsets = even_offsets(tasks, rows)
            run: Callable[[], Tensor] = partial(kernels.ghost_gram, a, d, offsets, backend="triton")
            yield "ghost_gram", dtype, f"K={tasks} N={rows}", 1e-5, run, _materialised(a, d, offsets)
    lora = Lora(1, 1, 4096, 4096, 16, torch.bfloat16) if gpu else replace(TINY, modules=1, dtype=torch.bfloat16)
    for clients in CLIENTS:
        (B,), (A,) = factors(replace(lora, clients=clients), device)
        W = torch.randn(lora.m, lora.n, generator=torch.Generator().manual_seed(2)).to(device, lora.dtype)
        c, out = sample_weights(clients).to(device), torch.empty_like(W)
        run = partial(kernels.lowrank_sum, W, B, A, c, out=out, backend="triton")
        yield "lowrank_sum", lora.dtype, f"U={clients} r={lora.rank}", 2.5e-3, run, W.double() + dense_update(B, A, c)


def _materialised(a: Tensor, d: Tensor, offsets: list[int]) -> Tensor:
    """The Gram matrix of the gradients themselves, in float64."""
    g = torch.stack([(d[s:e].double().T @ a[s:e].double()).flatten() for s, e in pairwise(offsets)])
    return g @ g.T
