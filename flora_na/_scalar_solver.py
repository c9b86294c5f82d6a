"""The compiled solver of FLoRA-NA's scalars (``native/scalars.c``): modules with formed Grams on a CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch

from fedgram.kernels._native import Extension, at, run_jobs

from .coefficients import SAFE_PIVOT, Evidence, ScalarPair
from .divergence import MARGIN, rounding
from .group import Group

MOST_CLIENTS = 128  # above, LAPACK factorises the normal equations faster
SOLVER = Extension(
    "fedgram.flora_na._fedgram_solver",
    {"fedgram_scalars": "pip p"},
    {"fedgram_abi": "", "fedgram_figures": "", "fedgram_scalars_work": "iii"},
    abi=3,
)
STATUS = ("converged", "max-sweeps")
DOUBTFUL = 2


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
    scalars, found = _solve(group, (tolerance, coarse), max_sweeps)
    if (found[:, 0] == DOUBTFUL).any():
        return None
    status = STATUS[int(found[:, 0].max())] if max_sweeps else "closed-form"
    energy, error, average = torch.from_numpy(np.ascontiguousarray(found[:, 2:5].T))
    norms = torch.from_numpy(found[:, 5:7])
    group.memo.setdefault("energies", energy)
    if bool((average >= 0).all()):
        group.memo.setdefault("average errors", average)
    p, q = torch.from_numpy(scalars)
    return ScalarPair(group, p, q, status, int(found[:, 1].max()), Evidence(error, norms))


def _solve(group: Group, tolerances: tuple[float, float], max_sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """p and q (2, L, U), and the solver's figures (L, 7)."""
    assert group.gram is not None
    L, U, R, rank = len(group.targets), len(group.ranks), group.total_rank, group.rank
    library = SOLVER.loaded
    layout = _layout(group.ranks)
    weights = group.weights.numpy()
    grams = [group.gram[side].contiguous() for side in ("B", "A")]
    scalars, found = np.empty((2, L, U)), np.empty((L, library.fedgram_figures()))
    steps = np.arange(L)
    jobs = np.empty((L, 18), dtype=np.int64)
    jobs[:, 0], jobs[:, 1] = (g.data_ptr() + 8 * R * R * steps for g in grams)
    jobs[:, 2] = at(weights) + 8 * U * steps
    jobs[:, 3:11] = (*map(at, layout), U, R, rank, int(max_sweeps > 0), max_sweeps)
    jobs[:, 11:15] = np.array([*tolerances, SAFE_PIVOT, MARGIN * rounding(group)]).view(np.int64)
    jobs[:, 15], jobs[:, 16] = (at(scalars) + 8 * U * (steps + L * side) for side in range(2))
    jobs[:, 17] = at(found) + 8 * found.shape[1] * steps
    # a handful of sweeps of some four products with either Gram
    work = L * R * R * (10 if max_sweeps else 1)
    run_jobs(library.fedgram_scalars, jobs, library.fedgram_scalars_work(U, R, rank), work)
    return scalars, found


@functools.lru_cache(maxsize=64)
def _layout(ranks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ranks, and of every stacked row the member that it belongs to and which of his it is; int64."""
    sizes = np.array(ranks, dtype=np.int64)
    member = np.repeat(np.arange(len(ranks)), sizes)
    return sizes, member, np.arange(len(member)) - (np.cumsum(sizes) - sizes)[member]
