"""The compiled solver of FLoRA-NA's scalars (``native/scalars.h``): modules with formed Grams on a CPU."""

from __future__ import annotations

import functools
from array import array

import torch
from torch import Tensor

from fedgram.kernels.native_calls import bits, run_jobs, table

from ._compiled import DOUBTFUL, SOLVER, STATUS, Scalar
from .coefficients import SAFE_PIVOT, Evidence, ScalarPair
from .energies import MARGIN, rounding
from .group import Group

MOST_CLIENTS = 128  # above, LAPACK factorises the normal equations faster


def can_solve(group: Group) -> bool:
    """Whether the compiled solver takes this group: it may still refuse a module whose Grams leave doubt."""
    fits = group.gram is not None and not group.anchored and len(group.ranks) <= MOST_CLIENTS
    return fits and group.device.type == "cpu" and group.rank > 0 and SOLVER.missing is None


def certified_pair(
    group: Group, *, tolerance: float = 0.0, coarse: float = 0.0, max_sweeps: int = 0
) -> ScalarPair | None:
    """The least-squares scalars of every module with their errors; None where one is in doubt, or not for this solver.

    In doubt is what stands less than ``MARGIN`` clear of the rounding of the Grams: an energy, a squared error, a pivot
    of normal equations. The general path then decides.

    Args:
        group: any.
        tolerance: stop once a sweep lowers the squared error by less than this fraction of it.
        coarse: what is still called converged after ``max_sweeps``.
        max_sweeps: an upper bound; 0 leaves the averages as they are.
    """
    if not can_solve(group):
        return None
    scalars, figures = _solved(group, (tolerance, coarse), max_sweeps)
    found = figures.tolist()
    state = int(max(row[Scalar.STATUS] for row in found))
    if state == DOUBTFUL:  # the other figures may not be set
        return None
    ended = tuple(
        (STATUS[int(row[Scalar.STATUS])] if max_sweeps else "closed-form", int(row[Scalar.SWEEPS])) for row in found
    )
    status, sweeps = STATUS[state] if max_sweeps else "closed-form", max(count for _, count in ended)
    if group.memo.energies is None:
        group.memo.energies = figures[:, Scalar.ENERGY]
    if group.memo.average_errors is None and min(row[Scalar.ERROR_START] for row in found) >= 0:
        group.memo.average_errors = figures[:, Scalar.ERROR_START]
    evidence = Evidence(figures[:, Scalar.ERROR], figures[:, Scalar.NORM_B :])
    return ScalarPair(group, scalars[0], scalars[1], status, sweeps, evidence, ended)


def doubtful_modules(group: Group, *, tolerance: float = 0.0, coarse: float = 0.0, max_sweeps: int = 0) -> list[int]:
    """Positions of the modules for whose sake ``certified_pair`` refuses the group; none where it is not for it."""
    if not can_solve(group):
        return []
    _, figures = _solved(group, (tolerance, coarse), max_sweeps)
    return [l for l, state in enumerate(figures[:, Scalar.STATUS].tolist()) if state == DOUBTFUL]


def _solved(group: Group, tolerances: tuple[float, float], max_sweeps: int) -> tuple[Tensor, Tensor]:
    """``_solve``, once per group."""
    known = group.memo.scalars
    if (tolerances, max_sweeps) not in known:
        known[tolerances, max_sweeps] = _solve(group, tolerances, max_sweeps)
    return known[tolerances, max_sweeps]


def _solve(group: Group, tolerances: tuple[float, float], max_sweeps: int) -> tuple[Tensor, Tensor]:
    """p and q (2, L, U), and the solver's figures (L, 7)."""
    assert group.gram is not None
    L, U, R, rank = len(group.targets), len(group.ranks), group.total_rank, group.rank
    library = SOLVER.loaded
    layout, addresses = _layout(group.ranks)
    weights, grams = group.weights.contiguous(), [group.gram[side].contiguous() for side in ("B", "A")]
    figures = library.fedgram_scalar_figures()
    scalars = torch.empty(2, L, U, dtype=torch.float64, device="cpu")
    found = torch.empty(L, figures, dtype=torch.float64, device="cpu")
    limits = map(bits, (*tolerances, SAFE_PIVOT, MARGIN * rounding(group)))
    common = (*addresses, U, R, rank, int(max_sweeps > 0), max_sweeps, *limits)
    square, line, row = 8 * R * R, 8 * U, 8 * figures
    b, a, w, p, f = (t.data_ptr() for t in (*grams, weights, scalars, found))
    q = p + line * L
    jobs = [
        (b + square * l, a + square * l, w + line * l, *common, p + line * l, q + line * l, f + row * l)
        for l in range(L)
    ]
    # a handful of sweeps of some four products with either Gram
    work = L * R * R * (10 if max_sweeps else 1)
    run_jobs(SOLVER.entries["scalars"], table(jobs), L, library.fedgram_scalars_work(U, R, rank), work)
    del layout  # kept until here
    return scalars, found


@functools.lru_cache(maxsize=64)
def _layout(ranks: tuple[int, ...]) -> tuple[list[array], list[int]]:
    """The ranks, and of every stacked row the member that it belongs to and which of his it is; their addresses."""
    columns = [
        table([ranks]),
        table([u] * rank for u, rank in enumerate(ranks)),
        table(range(rank) for rank in ranks),
    ]
    return columns, [column.buffer_info()[0] for column in columns]
