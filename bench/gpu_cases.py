"""Small problems for every operation with float64 truths: what the GPU script checks, repeats and captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgram import kernels

from .gpu_support import LAYOUTS, Guarded, laid
from .peers.operations import weighted_sum
from .reference import GRAM
from .workloads import clustered_samples, even_offsets, name_of

Run = Callable[[str], list[Tensor]]
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
PRECISE = 1e-7
ROUNDING = {torch.float64: 1e-12, torch.float32: 2.5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class OpCase:
    """One operation on one input.

    Attributes:
        name: operation, sizes, type and layout.
        op: the operation.
        run: takes a backend, returns the outputs.
        truths: float64, one per output.
        tolerance: of the relative error (Frobenius) of every output.
        guards: outputs whose surroundings must stay as they were.
        inputs: tensors that may be overwritten with other values of the same kind between graph replays.
    """

    name: str
    op: str
    run: Run
    truths: Sequence[Tensor]
    tolerance: float
    guards: Sequence[Guarded] = ()
    inputs: Sequence[Tensor] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sizes:
    """Modules as (m, n) and the clients' ranks, the same in each."""

    name: str
    modules: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


TINY = Sizes("tiny", ((33, 20),), (2, 3))
RAGGED = Sizes("ragged", ((129, 77), (65, 200)), (1, 3, 5, 16, 64))
EVEN = Sizes("even", ((512, 384), (256, 512)), (16,) * 6)
ONE = Sizes("one", ((1, 1),), (1,))
LONG = Sizes("long", ((11008, 4096),), (16,) * 20)


def factor_cases(device: torch.device, sizes: Sizes, dtype: torch.dtype, layout: str) -> Iterator[OpCase]:
    """``factor_gram``, ``factor_cross``, ``factor_combine`` and ``lowrank_sum`` on one set of factors."""
    random = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return laid(torch.randn(shape, generator=random).to(device, dtype), layout)

    B = [[tensor(m, r) for r in sizes.ranks] for m, _ in sizes.modules]
    A = [[tensor(r, n) for r in sizes.ranks] for _, n in sizes.modules]
    flat = [t for side in (B, A) for clients in side for t in clients]
    Bs = [torch.cat([b.double() for b in bs], 1) for bs in B]
    As = [torch.cat([a.double() for a in as_]) for as_ in A]
    label = f"{sizes.name} {name_of(dtype)} {layout}"
    grams = [x.T @ x for x in Bs] + [x @ x.T for x in As]
    yield OpCase(
        f"factor_gram {label}",
        "factor_gram",
        lambda k: _flat(kernels.factor_gram(B, A, backend=k)),
        grams,
        GRAM,
        (),
        flat,
    )
    if dtype == torch.float32:
        run = lambda k: _flat(kernels.factor_gram(B, A, precise=True, backend=k))  # noqa: E731
        yield OpCase(f"factor_gram precise {label}", "factor_gram", run, grams, PRECISE, (), flat)
    X_B, X_A = [tensor(m, 8) for m, _ in sizes.modules], [tensor(8, n) for _, n in sizes.modules]
    crosses = [x.T @ y.double() for x, y in zip(Bs, X_B, strict=True)]
    crosses += [x @ y.double().T for x, y in zip(As, X_A, strict=True)]
    # relative to |X||Y|, which random products fall short of by the square root of their length
    worst = GRAM * max(max(shape) for shape in sizes.modules) ** 0.5
    run = lambda k: _flat(kernels.factor_cross(B, A, X_B, X_A, backend=k))  # noqa: E731
    yield OpCase(f"factor_cross {label}", "factor_cross", run, crosses, worst, (), [*flat, *X_B, *X_A])
    yield from _combinations(device, sizes, dtype, label, B, A, Bs, As, flat)


def _combinations(
    device: torch.device, sizes: Sizes, dtype: torch.dtype, label: str,
    B: list[list[Tensor]], A: list[list[Tensor]], Bs: list[Tensor], As: list[Tensor], flat: list[Tensor],
) -> Iterator[OpCase]:  # fmt: skip
    random = torch.Generator().manual_seed(2)
    R, top = sum(sizes.ranks), max(sizes.ranks)

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=random).to(device)

    P, Q = [wide(R, 4) for _ in B], [wide(4, R) for _ in A]
    p = [wide(len(sizes.ranks)) for _ in B]
    spread = torch.cat([torch.eye(r, top, dtype=torch.float64, device=device) for r in sizes.ranks])
    rows = torch.repeat_interleave(
        torch.arange(len(sizes.ranks), device=device), torch.tensor(sizes.ranks, device=device)
    )
    pads = [x[rows].unsqueeze(1) * spread for x in p]
    for kind, left, right, blocks in (("blocks", P, Q, (P, Q)), ("scalars", p, p, (pads, [x.T for x in pads]))):
        truths = [x @ c for x, c in zip(Bs, blocks[0], strict=True)] + [
            c @ x for x, c in zip(As, blocks[1], strict=True)
        ]
        run = lambda k, left=left, right=right: _flat(kernels.factor_combine(B, A, left, right, backend=k))  # noqa: E731
        yield OpCase(f"factor_combine {kind} {label}", "factor_combine", run, truths, ROUNDING[dtype], (), flat)
    c = wide(len(sizes.ranks))
    m, n = sizes.modules[0]
    W = torch.randn(m, n, generator=random).to(device, dtype)
    out = Guarded.of((m, n), dtype, device)
    truth = 0.5 * W.double() + (Bs[0] * c[rows]) @ As[0]

    def low(backend: str) -> list[Tensor]:
        return [kernels.lowrank_sum(W, B[0], A[0], c, beta=0.5, out=out.view, backend=backend)]

    yield OpCase(f"lowrank_sum {label}", "lowrank_sum", low, [truth], ROUNDING[dtype], (out,), [*flat, W])


def gradient_cases(
    device: torch.device, K: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: str
) -> Iterator[OpCase]:
    """``grad_gram`` and ``grad_combine`` on K lists with a common part; ``mixed``: of two layouts in turn."""
    layouts = ("misaligned", "transposed") if layout == "mixed" else (layout,)
    random = torch.Generator().manual_seed(3)
    common = [torch.randn(s, generator=random) for s in shapes]
    lists = [
        [
            laid((c + torch.randn(c.shape, generator=random)).to(device, dtype), layouts[k % len(layouts)])
            for c in common
        ]
        for k in range(K)
    ]
    rows = torch.stack([torch.cat([t.double().flatten() for t in one]) for one in lists])
    mean = rows.mean(0)
    e = rows - mean
    truths = [mean @ mean, e @ mean, e @ e.T]
    flat = [t for one in lists for t in one]
    d = sum(c.numel() for c in common)
    label = f"K={K} d={d} {name_of(dtype)} {layout}"
    # h's entries cancel; a gram of the whole triple is what the promise is about
    scale = float(truths[0] + truths[2].diagonal().mean())

    def gram(backend: str) -> list[Tensor]:
        n0, h, H = kernels.grad_gram(lists, backend=backend)
        return [n0, h / scale + 1, H]

    truths[1] = truths[1] / scale + 1
    yield OpCase(f"grad_gram {label}", "grad_gram", gram, truths, GRAM * 2, (), flat)
    v = torch.randn(K, dtype=torch.float64, generator=random).to(device)
    guards = [Guarded.of(s, dtype, device) for s in shapes]

    def combine(backend: str) -> list[Tensor]:
        return kernels.grad_combine(lists, v, out=[g.view for g in guards], backend=backend)

    sums = [weighted_sum(v.tolist(), (t.double() for t in part)) for part in zip(*lists, strict=True)]
    yield OpCase(f"grad_combine {label}", "grad_combine", combine, sums, ROUNDING[dtype], guards, flat)


def ghost_cases(device: torch.device, N: int, p: int, q: int, K: int, dtype: torch.dtype) -> Iterator[OpCase]:
    """``ghost_gram`` with and without bias, and on token numbers."""
    random = torch.Generator().manual_seed(4)
    a, d = (torch.randn(N, n, generator=random).to(device, dtype) for n in (p, q))
    tokens = torch.randint(0, 7, (N,), generator=random).to(device)
    offsets = even_offsets(K, N)
    task = torch.nn.functional.one_hot(torch.bucketize(torch.arange(N), torch.tensor(offsets[1:]), right=True), K)
    task = task.double().to(device)
    dd = d.double() @ d.double().T
    same = (tokens[:, None] == tokens[None]).double()
    for name, left, first, bias in (
        ("rows", a.double() @ a.double().T, a, False), ("bias", a.double() @ a.double().T + 1, a, True),
        ("tokens", same, tokens, False),
    ):  # fmt: skip
        truth = task.T @ (left * dd) @ task
        run = lambda k, first=first, bias=bias: [kernels.ghost_gram(first, d, offsets, bias=bias, backend=k)]  # noqa: E731
        yield OpCase(
            f"ghost_gram {name} N={N} {p}x{q} K={K} {name_of(dtype)}", "ghost_gram", run, [truth], 1e-5, (), [d]
        )


def subset_cases(device: torch.device, classes: int, per_class: int, p: int, m: int) -> Iterator[OpCase]:
    """``subset_select``: the errors it reports, against those of the twin on the CPU."""
    X, _ = clustered_samples(classes, per_class, p)
    offsets, counts = [k * per_class for k in range(classes + 1)], [m] * classes
    truth = kernels.subset_select(X, offsets, counts, backend="torch").error
    there = X.to(device)

    def run(backend: str) -> list[Tensor]:
        return [kernels.subset_select(there, offsets, counts, backend=backend).error]

    yield OpCase(f"subset_select {classes} x {per_class} x {p}, m={m}", "subset_select", run, [truth.to(device)], 1e-6)


SMALL_SHAPES = ((37, 11), (5,), (), (0,), (130,), (2, 1100))  # the last one: whole blocks without masks
WIDE_SHAPES = ((512, 512), (512,), (100_003,))


def small_cases(device: torch.device) -> Iterator[OpCase]:
    """A few of every operation: for repeats, graphs and sanitisers."""
    yield from factor_cases(device, RAGGED if device.type == "cuda" else TINY, torch.float32, "plain")
    yield from factor_cases(device, TINY, torch.bfloat16, "misaligned")
    yield from gradient_cases(device, 5, SMALL_SHAPES, torch.float32, "plain")
    yield from gradient_cases(device, 3, SMALL_SHAPES, torch.bfloat16, "misaligned")
    yield from ghost_cases(device, 70, 33, 20, 4, torch.float32)
    yield from subset_cases(device, 3, 30, 6, 4)


def all_cases(device: torch.device, part: str) -> Iterator[OpCase]:
    """What one part of the correctness section runs (see ``part_of``); on a CPU, in the interpreter, the tiny ones."""
    found = small_cases(device) if device.type == "cpu" else _cases(device, part)
    return (case for case in found if part_of(case) == part)


def part_of(case: OpCase) -> str:
    """``bf16``, ``fp32``, ``fp16`` or ``fp64``; ``subset`` where an operation knows one type only."""
    return next((name for name in map(name_of, DTYPES) if name in case.name.split()), "subset")


def _cases(device: torch.device, part: str) -> Iterator[OpCase]:
    if part == "subset":
        yield from subset_cases(device, 10, 200, 64, 10)
        yield from subset_cases(device, 2, 3000, 32, 5)
        return
    dtype = next(t for t in DTYPES if name_of(t) == part)
    for layout in LAYOUTS:
        yield from factor_cases(device, RAGGED, dtype, layout)
    for layout in (*LAYOUTS[:3], "mixed"):
        yield from gradient_cases(device, 7, SMALL_SHAPES, dtype, layout)
    yield from ghost_cases(device, 200, 77, 130, 5, dtype)
    if dtype in DTYPES[:2]:
        for sizes in (EVEN, ONE, LONG):
            yield from factor_cases(device, sizes, dtype, "plain")
        for K in (1, 20, 64, 130):
            yield from gradient_cases(device, K, WIDE_SHAPES, dtype, "plain")
    if dtype == torch.float32:
        yield from ghost_cases(device, 1000, 512, 512, 1, dtype)
    if dtype == torch.bfloat16:
        yield from ghost_cases(device, 512, 1024, 1024, 32, dtype)


def _flat(pair: tuple[list[Tensor] | None, list[Tensor] | None]) -> list[Tensor]:
    return [*(pair[0] or ()), *(pair[1] or ())]
