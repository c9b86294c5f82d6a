"""The compiled CPU loops over the clients' factors: all modules' products and combinations, each in one call."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._memory import address
from ._stacks import ADDRESS, TYPE, WIDTH, Stacks
from .native_calls import LOOPS, RANGES, at, constant, equal_ranges, part_numbers, run_jobs, table, tile

CACHE_BYTES = 3 << 17  # of one block of factors: most of a small L2 cache
JOB_WORK = 1 << 20  # work (vector operations) below which a range of rows is not worth a job of its own
CROSSED, APART, BESIDE = 0, 1, 2  # what a combination is to the product (native.c)
PART_SHARE = 4  # the parts of a product have a fourth of the numbers of its factors at most


def _padded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _rows_per_block(columns: int) -> int:
    """Rows of a float64 block of ``columns`` that fits the cache: a multiple of 32."""
    return max(64, min(512, CACHE_BYTES // (8 * max(columns, 1)) // 32 * 32))


def _ranges(length: int, block: int, work: int, most: int) -> list[tuple[int, int]]:
    """Equal ranges of whole blocks of rows: ``work`` is that of one row."""
    return equal_ranges(length, max(1, min(RANGES, most, length * work // JOB_WORK)), block)


Coefficients = Sequence[Tensor]


class _Side(NamedTuple):
    """One side's products: ``S^T S``, or ``S^T X``; or with P, ``S P`` is written to ``to`` in the same read.

    What was written, ``written`` says: it is X, and more columns of S; nothing else; or only more columns of S.
    """

    S: Stacks
    X: Stacks | None = None
    P: Coefficients | None = None
    to: Stacks | None = None
    written: int = CROSSED

    def shapes(self) -> list[tuple[int, int]]:
        """Of every module, that of its product."""
        none = [0] * len(self.S)
        joined = none if self.to is None or self.written == APART else self.to.ranks
        rows = [own + more for own, more in zip(self.S.ranks, joined, strict=True)]
        return list(zip(rows, rows if self.X is None else self.X.ranks, strict=True))


def _matrices(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Matrices to be written to, float64; those of one shape lie one behind the other."""
    rest = {
        shape: iter(torch.empty(n, *shape, dtype=torch.float64, device="cpu").unbind())
        for shape, n in Counter(shapes).items()
    }
    return [next(rest[shape]) for shape in shapes]


def factor_products(sides: Sequence[tuple[Stacks, Stacks | None]]) -> list[list[Tensor]]:
    """Per side and module ``S^T S``, or ``S^T X`` for the other stacks X; float64. All of them in one go."""
    return _products([_Side(S, X) for S, X in sides])


def combine_with_products(sides: Sequence[tuple[Stacks, Coefficients, Stacks]]) -> list[list[Tensor]]:
    """``factor_combine``, and per side and module the products (R + r, r) of ``[S, S P]`` with ``S P`` as rounded.

    In one read of the factors. Scalars (U,) are taken where ``S.mixable``.
    """
    return _products([_Side(S, to, P, to) for S, P, to in sides])


def combine_with_grams(sides: Sequence[tuple[Stacks, Coefficients, Stacks]], *, beside: bool) -> list[list[Tensor]]:
    """``factor_combine``, and per side and module ``S^T S``, in one read of the factors.

    With what was written, as rounded, ``beside`` S: as its last columns.
    """
    return _products([_Side(S, None, P, to, BESIDE if beside else APART) for S, P, to in sides])


def _products(sides: Sequence[_Side]) -> list[list[Tensor]]:
    deep, width = tile()
    jobs: list[tuple[int, ...]] = []
    wholes: list[tuple[int, ...]] = []
    kept: list[Tensor | np.ndarray] = []
    results: list[list[Tensor]] = []
    part = work = numbers = 0  # where the next part lies, in numbers
    outputs = iter(_matrices([shape for side in sides for shape in side.shapes()]))
    for side in sides:
        S, X = side.S, side.X
        results.append([])
        for l, ((R, k), own, length) in enumerate(zip(side.shapes(), S.ranks, S.lengths, strict=True)):
            other, written = 0 if X is None else X.at[l], _written(side, l, width, kept)
            rows, columns = _padded(R, deep), _padded(k, width)
            packed = _padded(R, width) + (columns if other else 0)
            block = _rows_per_block(packed)  # with a combination too: the same sums, to the last bit, as without
            packed += width + 1 if written.to else 0
            cost = R * k // 8 + R + (own * k // 8 if written.stride else 0)
            ranges = _ranges(length, block, cost, length * R // (PART_SHARE * rows * columns + 1))
            numbers, work = max(numbers, packed * block), work + length * cost
            step = part_numbers(rows, columns, X is None)
            out = next(outputs)
            results[-1].append(out)
            wholes.append((part, len(ranges), rows, columns, R, k, X is None, out.data_ptr()))
            for first, last in ranges:
                job = (S.at[l], S.counts[l], own, other, k, first, last, block, rows, columns, *written, part)
                jobs.append(job)
                part += step
    _run_products(jobs, wholes, part, numbers, work)
    return results


class _Written(NamedTuple):
    """The combination that a job of products writes first: where to, coefficients, what it is to the product."""

    to: int = 0
    P: int = 0
    stride: int = 0
    kind: int = CROSSED


def _written(side: _Side, l: int, width: int, kept: list[Tensor | np.ndarray]) -> _Written:
    """What is written of a module, with coefficients as the loops take them; ``kept`` is to hold their memory."""
    if side.P is None or side.to is None:
        return _Written()
    P, rank, to = side.P[l], side.to.ranks[l], side.to.at[l]
    if P.ndim == 1 and rank % (width // 2) == 0:  # whole vectors
        scalars = (P.detach() if P.requires_grad else P).contiguous()
        kept.append(scalars)
        return _Written(to, address(scalars), 0, side.written)
    if P.ndim == 1:
        P = spread_scalars(P, [rank] * side.S.counts[l])
    coefficients = _padded_columns(P, width)
    kept.append(coefficients)
    return _Written(to, at(coefficients), coefficients.shape[1], side.written)


def spread_scalars(p: Tensor, ranks: Sequence[int]) -> Tensor:
    """One number per client as blocks (R, r): diagonal, with zero columns up to the largest rank."""
    eye = torch.eye(max(ranks), dtype=p.dtype, device=p.device)
    return torch.cat([x * eye[:r] for x, r in zip(p, ranks, strict=True)])


def _padded_columns(P: Tensor, width: int) -> np.ndarray:
    """Coefficients (R, r) with zero columns up to a multiple of ``width``."""
    R, rank = P.shape
    coefficients = np.zeros((R, _padded(rank, width)))
    coefficients[:, :rank] = P.detach().numpy()
    return coefficients


def _run_products(
    jobs: list[tuple[int, ...]], wholes: list[tuple[int, ...]], parts: int, numbers: int, work: int
) -> None:
    memory = np.empty(parts)  # the loops set all of it
    start = at(memory)
    multiply = table([(*job, start + 8 * part) for *job, part in jobs])
    collect = table([(start + 8 * part, *whole) for part, *whole in wholes])
    run_jobs(LOOPS.entries["products"], multiply, len(jobs), numbers, work)
    run_jobs(LOOPS.entries["collect"], collect, len(wholes), 0, parts // 4)


def factor_combine(sides: Sequence[tuple[Stacks, Sequence[Tensor], Stacks]]) -> None:
    """Write ``S P`` per side and module to the third's tall (length, r), which is contiguous.

    P are float64 blocks (R, r), or one scalar per client (U,) where ``S.mixable``.
    """
    mixed = [(S, [l for l, p in enumerate(P) if p.ndim == 1], P, to) for S, P, to in sides]
    _mix([side for side in mixed if side[1]])
    _combine([(S, l, p, to) for S, P, to in sides for l, p in enumerate(P) if p.ndim == 2])


Part = tuple[Stacks, int, Tensor, Stacks]


def _combine(parts: Sequence[Part]) -> None:
    if not parts:
        return
    pad, (_, width) = constant("pad"), tile()
    jobs: list[tuple[int, ...]] = []
    kept: list[np.ndarray] = []
    work = numbers = 0
    for S, l, p, to in parts:
        R, rank = p.shape
        coefficients = _padded_columns(p, width)
        kept.append(coefficients)
        block = _rows_per_block(_padded(R, width))
        job = (S.at[l], S.counts[l], R, at(coefficients), coefficients.shape[1], to.at[l])
        jobs += [(*job, *bounds, block) for bounds in _ranges(S.lengths[l], block, R * rank // 8 + R, RANGES)]
        numbers, work = max(numbers, (R + 2 * width) * (block + pad)), work + S.lengths[l] * (R * rank // 8 + R)
    run_jobs(LOOPS.entries["combine"], table(jobs), len(jobs), numbers, work)


def _mix(sides: Sequence[tuple[Stacks, list[int], Sequence[Tensor], Stacks]]) -> None:
    """Factors that lie alike are mixed number by number, as if they were flat."""
    jobs: list[tuple[int, ...]] = []
    kept: list[Tensor | array] = []
    work = 0
    for S, modules, P, to in sides:
        bounds = table([(0, S.lengths[l] * to.ranks[l]) for l in modules])
        scalars = [P[l].detach().contiguous() for l in modules]
        kept += [bounds, *scalars]
        bound, column = bounds.buffer_info()[0], S.addresses.buffer_info()[0]
        for l, p in zip(modules, scalars, strict=True):
            clients, numbers, row = S.counts[l], S.lengths[l] * to.ranks[l], S.at[l]
            first_address = column + (row - S.at[0]) // WIDTH
            written = (to.at[l] + 8 * ADDRESS, to.at[l] + 8 * TYPE)
            job = (first_address, bound, row + 8 * TYPE, 1, clients, address(p), *written)
            step = max(1, JOB_WORK // clients)
            jobs += [(*job, first, min(first + step, numbers)) for first in range(0, numbers, step)]
            bound, work = bound + 16, work + numbers * clients // 4
    if jobs:
        run_jobs(LOOPS.entries["grad_combine"], table(jobs), len(jobs), constant("mix_work"), work)
