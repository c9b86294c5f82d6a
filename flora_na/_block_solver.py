"""The compiled alternating least squares (``native/blocks.h``): modules with formed Grams on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgram.kernels.native_calls import bits, run_jobs, table

from ._compiled import DOUBTFUL, SOLVER, STATUS, Block
from .coefficients import SAFE_PIVOT, Evidence, Pair
from .energies import MARGIN, rounding
from .group import Group

MOST_RANKS = 512  # total; three to five times as fast as matrix products of one module from 192 up to it
MOST_COLUMNS = 64


def certified_blocks(
    group: Group, start: Tensor, *, tolerance: float, max_sweeps: int, cancelled: float
) -> Pair | None:
    """Balanced pairs of every module with their errors; None where one is in doubt, or not for this solver.

    In doubt is what stands less than ``MARGIN`` clear of the rounding of the Grams, a combination of factors that
    cancels, combinations that are nearly parallel, a product of lower rank. The general path then decides.

    Args:
        group: any.
        start: (L, R, r) float64, coefficients of the rows of A to start from.
        tolerance, max_sweeps: as of ``AlternatingLeastSquares``; every module stops by itself.
        cancelled: a combination this small beside its terms is rounding.
    """
    (_, R, rank), gram = start.shape, group.gram
    fits = gram is not None and 0 < rank <= min(R, MOST_COLUMNS) and R <= MOST_RANKS
    if not fits or group.device.type != "cpu" or SOLVER.missing is not None:
        return None
    assert gram is not None
    pair, figures = _solve(group, gram, start.contiguous(), (tolerance, cancelled), max_sweeps)
    found = figures.tolist()
    state = int(max(row[Block.STATUS] for row in found))
    if state == DOUBTFUL:  # the other figures may not be set
        return None
    if group.memo.energies is None:
        group.memo.energies = figures[:, Block.ENERGY]
    ended = tuple((STATUS[int(row[Block.STATUS])], int(row[Block.SWEEPS])) for row in found)
    evidence = Evidence(figures[:, Block.ERROR], figures[:, Block.NORM_B :])
    return Pair(pair[0], pair[1], STATUS[state], max(count for _, count in ended), evidence, ended)


def _solve(
    group: Group, gram: dict, start: Tensor, limits: tuple[float, float], max_sweeps: int
) -> tuple[Tensor, Tensor]:
    """P and Q (2, L, R, r), and the solver's figures (L, 6)."""
    L, R, rank = start.shape
    library = SOLVER.loaded
    D, grams = group.D.contiguous(), [gram[side].contiguous() for side in ("B", "A")]
    figures = library.fedgram_block_figures()
    pair = torch.empty(2, L, R, rank, dtype=torch.float64, device="cpu")
    found = torch.empty(L, figures, dtype=torch.float64, device="cpu")
    tolerance, cancelled = limits
    common = (R, rank, max_sweeps, *map(bits, (tolerance, SAFE_PIVOT, cancelled, MARGIN * rounding(group))))
    square, line, block, row = 8 * R * R, 8 * R, 8 * R * rank, 8 * figures
    b, a, d, y, p, f = (t.data_ptr() for t in (*grams, D, start, pair, found))
    jobs = []
    for l in range(L):
        given = (b + square * l, a + square * l, d + line * l, y + block * l)
        jobs.append((*given, *common, p + block * l, p + block * (L + l), f + row * l))
    # a handful of sweeps of a product with either Gram
    work = L * R * R * rank * min(max_sweeps, 5) // 2
    run_jobs(SOLVER.entries["blocks"], table(jobs), L, library.fedgram_blocks_work(R, rank), work)
    return pair, found
