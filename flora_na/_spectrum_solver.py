"""The compiled spectrum (``native/spectrum.h``): of modules with formed Grams on a CPU the squared singular values, and
the optimum's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedgram.kernels._native import bits, run_jobs, table

from ._compiled import DOUBTFUL, SOLVER
from .coefficients import SAFE_PIVOT
from .group import Group

MOST_RANKS = 384  # total; above, LAPACK, which works in blocks, is faster


class CompiledSpectrum(NamedTuple):
    """What the compiled solver knows of L modules.

    Attributes:
        values: (L, R) squared singular values of dW, descending, float64.
        rows: (L, R, rank) float64 coefficients of rows of A that span those of the best pair of that rank.
        left: the modules left out, whose values and rows are not set: their Gram of A is not safely definite, and the
            general path takes its square root from eigenvectors.
    """

    values: Tensor
    rows: Tensor
    left: list[int]


def compiled_spectrum(group: Group, rank: int = 0) -> CompiledSpectrum | None:
    """The singular values of every module's dW, and the best rows of ``rank``, at most R.

    None where the group is not for this solver.
    """
    L, R = len(group.targets), group.total_rank
    if group.gram is None or not 0 < R <= MOST_RANKS or group.device.type != "cpu" or SOLVER.missing is not None:
        return None
    library = SOLVER.loaded
    D, grams = group.D.contiguous(), [group.gram[side].contiguous() for side in ("B", "A")]
    values, found = torch.empty(L, R, dtype=torch.float64), torch.empty(L, dtype=torch.float64)
    rows = torch.empty(L, R, rank, dtype=torch.float64)
    b, a, d, v, y, f = (t.data_ptr() for t in (*grams, D, values, rows, found))
    square, line, block, pivot = 8 * R * R, 8 * R, 8 * R * rank, bits(SAFE_PIVOT)
    jobs = [
        (b + square * l, a + square * l, d + line * l, R, rank, pivot, v + line * l, y + block * l, f + 8 * l)
        for l in range(L)
    ]
    run_jobs(SOLVER.entries["spectrum"], table(jobs), L, library.fedgram_spectrum_work(R), L * R * R * R)
    return CompiledSpectrum(values, rows, [l for l, state in enumerate(found.tolist()) if state == DOUBTFUL])
