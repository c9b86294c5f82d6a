"""What the host itself spends on operations over tens of thousands of tensors.

``python -P -m fedgram.bench.host_overhead``. Everything runs but the kernels: each launch is replaced by one that only
counts itself. The tensors are those of W2 (a 7B Llama, all linear layers: 224 modules, 100 clients, rank 16, 44,800
tensors) in memory that is never touched, so that neither a GPU nor 8 GB are needed. Whole aggregations run on as many
tensors of which only one client's hold a column: the sequence of calls is that of W2, and the arithmetic on
coefficients, a GPU's work there, takes no time. Quoted are medians of the thread's processor time over calls that
repeat an earlier one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedgram import flora_na, kernels
from fedgram.flora_na import _batched_group, batched

from .workloads import LLAMA_BLOCK


class CountedLaunch:
    """Stands in for a kernel: takes any grid and arguments, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> CountedLaunch:
        """The launch for a grid, which is not looked at."""
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        """Count."""
        self.count += 1


@contextmanager
def without_kernels() -> Iterator[CountedLaunch]:
    """Replace the factor operations' kernels."""
    from fedgram.kernels import _factor_combine_triton, _factor_gram_triton, _grad_combine_triton

    launch = CountedLaunch()
    modules = (_factor_gram_triton, _factor_combine_triton, _grad_combine_triton)  # the last: scalars of equal factors
    places = [(m, n) for m in modules for n in vars(m) if n.endswith("_kernel")]
    kept = [(m, n, getattr(m, n)) for m, n in places]
    for module, name in places:
        setattr(module, name, launch)
    try:
        yield launch
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def lists(shapes: Sequence[tuple[int, int]], clients: int, rank: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Factors as they arrive in state dicts: every tensor with memory of its own."""

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    B = [[made(m, rank) for _ in range(clients)] for m, _ in shapes]
    A = [[made(rank, n) for _ in range(clients)] for _, n in shapes]
    return B, A


def milliseconds(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """First call and the median of the others, of this thread; rubbish is collected before, not within."""
    gc.collect()
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        run()
        times.append((time.thread_time() - start) * 1e3)
    return {"first_ms": times[0], "median_ms": statistics.median(times[1:]), "calls": repeats + 1}


def operations(B: kernels.PreparedSide | list, A: kernels.PreparedSide | list, rank: int) -> dict[str, Callable]:
    """The operations of an aggregation on these factors."""
    L, U = len(B), len(B[0])
    random = torch.Generator().manual_seed(0)
    p = list(torch.rand(L, U, dtype=torch.float64, generator=random))
    P = list(torch.rand(L, U * rank, rank, dtype=torch.float64, generator=random))
    Q = list(torch.rand(L, rank, U * rank, dtype=torch.float64, generator=random))
    X_B = [torch.empty(b[0].shape[0], rank, dtype=torch.bfloat16) for b in B]
    X_A = [torch.empty(rank, a[0].shape[1], dtype=torch.bfloat16) for a in A]
    return {
        "factor_gram": lambda: kernels.factor_gram(B, A, backend="triton"),
        "factor_combine scalars": lambda: kernels.factor_combine(B, A, p, p, backend="triton"),
        "factor_combine blocks": lambda: kernels.factor_combine(B, A, P, Q, backend="triton"),
        "factor_cross": lambda: kernels.factor_cross(B, A, X_B, X_A, backend="triton"),
    }


def measure(shapes: Sequence[tuple[int, int]], clients: int, rank: int) -> list[dict[str, Any]]:
    """Rows for plain lists, prepared lists and a slab: every operation, then whole aggregations."""
    B, A = lists(shapes, clients, rank)
    start = time.thread_time()
    prepared = kernels.prepare(B, A)
    rows: list[dict[str, Any]] = [
        {"factors": "lists", "name": "prepare", "median_ms": 1e3 * (time.thread_time() - start)}
    ]
    slab = kernels.FactorSlab(shapes, [rank] * clients, dtype=torch.bfloat16).factors
    with without_kernels() as launch:
        for kind, b, a in (("lists", B, A), ("prepared", prepared.B, prepared.A), ("slab", slab.B, slab.A)):
            for name, run in operations(b, a, rank).items():
                rows.append(_row(kind, name, run, launch))
        rows += _aggregations(len(shapes), clients, launch)
    return rows


def _row(kind: str, name: str, run: Callable[[], Any], launch: CountedLaunch) -> dict[str, Any]:
    launch.count = 0
    figures = milliseconds(run, 5 if kind == "lists" else 11)
    return {"factors": kind, "name": name, **figures, "launches": launch.count // figures["calls"]}


def _aggregations(modules: int, clients: int, launch: CountedLaunch) -> list[dict[str, Any]]:
    """``estimate_modules`` in the regime of W2 (no Grams are kept, the norms come from nine portions of modules)."""
    kept = batched.GRAM_RANK_LIMIT, _batched_group.PORTION_BYTES
    batched.GRAM_RANK_LIMIT, _batched_group.PORTION_BYTES = 0, 16 * -(-modules // 9)
    ranks = [1] + [0] * (clients - 1)
    slab = kernels.FactorSlab(((8, 8),) * modules, ranks, dtype=torch.bfloat16).factors
    B = [[torch.zeros(8, r, dtype=torch.bfloat16) for r in ranks] for _ in range(modules)]
    A = [[torch.zeros(r, 8, dtype=torch.bfloat16) for r in ranks] for _ in range(modules)]
    prepared = kernels.prepare(B, A)
    rows = []
    try:
        for kind, f in (("prepared", prepared), ("slab", slab)):
            for method in ("fedavg", "als"):

                def run(f: kernels.PreparedFactors = f, method: str = method) -> None:
                    with f.held():
                        flora_na.estimate_modules(f.B, f.A, method=method, sweeps=4, backend="triton")

                rows.append(_row(kind, f"estimate_modules {method}", run, launch))
    finally:
        batched.GRAM_RANK_LIMIT, _batched_group.PORTION_BYTES = kept
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print a table or JSON."""
    parser = argparse.ArgumentParser(prog="fedgram.bench.host_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=32, help="transformer blocks of seven modules each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "1"  # lets the Triton path take tensors on the CPU; no kernel runs
    rows = measure(LLAMA_BLOCK * options.blocks, options.clients, 16)
    if options.json:
        print(json.dumps(rows))
        return 0
    tensors = 2 * 7 * options.blocks * options.clients
    print(f"{tensors} tensors; milliseconds of the host outside kernels, repeated calls")
    for row in rows:
        first = f"first call {row['first_ms']:8.1f}, {row['launches']} launches" if "first_ms" in row else ""
        print(f"{row['factors']:9} {row['name']:24} {row['median_ms']:8.2f} ms  {first}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
