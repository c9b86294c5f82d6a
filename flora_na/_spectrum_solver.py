"""The compiled spectrum (``native/spectrum.h``): of modules with formed Grams on a CPU the squared singular values, and
the optimum's rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedgram.kernels.native_calls import bits, run_jobs, table

from ._compiled import DOUBTFUL, SOLVER, Spectral
from .coefficients import SAFE_PIVOT
from .group import Group

MOST_RANKS = 384  # total; above, LAPACK, which works in blocks, is faster


class CompiledSpectrum(NamedTuple):
    """What the compiled solver knows of L modules.

    Attributes:
        values: (L, count) the largest squared singular values of dW, descending, float64.
        tail: (L,) what all others add up to.
        rows: (L, R, rank) float64 coefficients of rows of A that span those of the best pair of that rank.
        left: the modules left out, of which nothing is set: their Gram of A is not safely definite, and the general
            path takes its square root from eigenvectors.
    """

    values: Tensor
    tail: Tensor
    rows: Tensor
    left: list[int]


def compiled_spectrum(group: Group, count: int, rank: int = 0) -> CompiledSpectrum | None:
    """The ``count`` largest singular values of every module's dW, and the best rows of ``rank``, at most ``count``.

    ``count`` is at most R. None where the group is not for this solver.
    """
    L, R = len(group.targets), group.total_rank
    if group.gram is None or not 0 < R <= MOST_RANKS or group.device.type != "cpu" or SOLVER.missing is not None:
        return None
    library = SOLVER.loaded
    D, grams = group.D.contiguous(), [group.gram[side].contiguous() for side in ("B", "A")]
    shapes = ((L, count), (L, library.fedgram_spectrum_figures()), (L, R, rank))
    values, figures, rows = (torch.empty(shape, dtype=torch.float64, device="cpu") for shape in shapes)
    given = [(t.data_ptr(), t.stride(0) * t.element_size()) for t in (*grams, D, values, rows, figures)]
    common = (R, count, rank, bits(SAFE_PIVOT))
    jobs = []
    for l in range(L):
        b, a, d, v, y, f = (first + stride * l for first, stride in given)
        jobs.append((b, a, d, *common, v, y, f))
    run_jobs(SOLVER.entries["spectrum"], table(jobs), L, library.fedgram_spectrum_work(R), L * R * R * R)
    left = [l for l, state in enumerate(figures[:, Spectral.STATUS].tolist()) if state == DOUBTFUL]
    return CompiledSpectrum(values, figures[:, Spectral.TAIL], rows, left)
