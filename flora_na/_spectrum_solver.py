"""The compiled spectrum (``native/spectrum.h``): squared singular values of modules with formed Grams on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgram.kernels._native import bits, run_jobs, table

from ._compiled import DOUBTFUL, SOLVER
from .coefficients import SAFE_PIVOT
from .group import Group

MOST_RANKS = 192  # total; above, LAPACK works in blocks


def compiled_spectrum(group: Group) -> tuple[Tensor, list[int]] | None:
    """(L, R) squared singular values of every module's dW, descending, float64, and the modules left out.

    Left out, their rows not set, are modules whose Gram of A is not safely definite: the general path takes its square
    root from eigenvectors. None where the group is not for this solver.
    """
    L, R = len(group.targets), group.total_rank
    if group.gram is None or not 0 < R <= MOST_RANKS or group.device.type != "cpu" or SOLVER.missing is not None:
        return None
    library = SOLVER.loaded
    D, grams = group.D.contiguous(), [group.gram[side].contiguous() for side in ("B", "A")]
    values, found = torch.empty(L, R, dtype=torch.float64), torch.empty(L, dtype=torch.float64)
    b, a, d, v, f = (t.data_ptr() for t in (*grams, D, values, found))
    square, line, pivot = 8 * R * R, 8 * R, bits(SAFE_PIVOT)
    jobs = [
        (b + square * l, a + square * l, d + line * l, R, pivot, v + line * l, f + 8 * l)
        for l in range(L)
    ]  # fmt: skip
    run_jobs(SOLVER.entries["spectrum"], table(jobs), L, library.fedgram_spectrum_work(R), L * R * R * R)
    return values, [l for l, state in enumerate(found.tolist()) if state == DOUBTFUL]
