"""Per class, the rows whose mean is nearest the mean of the class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._dispatch import resolve
from ._floats import FLOATS
from ._offsets import checked_offsets, host_integers
from ._plan import launching_on
from ._subset_swaps import MemberRows, Starts, descend, greedy

# Classes of at most this many rows get their Gram matrix; larger ones compute its rows as they are needed.
GRAM_ROWS = 2048
# Classes are searched together as long as their padded Grams and rows of members stay below this.
GROUP_BYTES = 64 << 20


class SubsetSelection(NamedTuple):
    """Chosen rows and their evidence, per class.

    Attributes:
        indices: (sum of counts,) int64 rows of X, class by class, ascending within each.
        error: (C,) float64 ``||mean of the chosen - mean of the class||``; inf where none is to be chosen.
        random_error: (C,) float64 root mean square of ``error`` over all subsets of that size,
            ``sqrt(tr(Sigma) (1/m)(1 - m/n))`` with Sigma the sample covariance (divided by n - 1).
        swap_optimal: (C,) bool, whether no exchange of a chosen row for another lowers ``error`` beyond rounding.
    """

    indices: Tensor
    error: Tensor
    random_error: Tensor
    swap_optimal: Tensor


class Problem(NamedTuple):
    """One class: its rows ``start`` to ``stop`` of X, of which ``wanted`` are to be chosen."""

    start: int
    stop: int
    wanted: int

    @property
    def rows(self) -> int:
        """Rows of the class."""
        return self.stop - self.start


def subset_select(
    X: Tensor,
    offsets: Tensor | Sequence[int],
    counts: Tensor | Sequence[int],
    *,
    restarts: int = 3,
    seed: int = 0,
    backend: str = "auto",
) -> SubsetSelection:
    """Choose m rows per class, ``min over |S| = m of ||mean_S - mean_class||`` (docs/math.md 2.4).

    Greedy selection and ``restarts`` random subsets are each improved by the best exchange of one row for another,
    from the centred class Gram in float64, until no exchange helps; the best of them is returned.

    Args:
        X: (N, p) rows sorted by class; float64, float32, bfloat16 or float16.
        offsets: (C + 1,) class boundaries, from 0 to N, never falling, on the host.
        counts: (C,) rows to choose of each class, at most its size, on the host.
        restarts: random starts beside the greedy one.
        seed: of the random starts; the same seed gives the same subsets.
        backend: "auto", "triton" or "torch".

    Returns:
        ``SubsetSelection``, its tensors on X's device.

    Raises:
        ValueError: shapes, types, offsets or counts that do not fit; values that are not finite.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    if torch.compiler.is_compiling():
        bounds, sizes = host_integers(offsets, "offsets"), host_integers(counts, "counts")
        return SubsetSelection(*_subset_select_op(X, bounds, sizes, restarts, seed, backend))
    problems = _checked_problems(X, offsets, counts)
    if restarts < 0:
        raise ValueError(f"restarts: expected 0 or more, got {restarts}")
    triton = resolve(backend, [X]) == "triton"
    generator = torch.Generator("cpu").manual_seed(seed)
    C = len(problems)
    indices: list[Tensor] = [X.new_empty(0, dtype=torch.int64)] * C
    error = torch.full((C,), math.inf, dtype=torch.float64, device=X.device)
    random_error = error.clone()
    optimal = torch.ones(C, dtype=torch.bool, device=X.device)
    draws = [_random_starts(problem, restarts, generator) for problem in problems]
    with torch.no_grad():
        for group in _groups(problems, restarts + 1, X.shape[1]):
            chosen = _select(X, [problems[c] for c in group], [draws[c] for c in group], triton)
            where = torch.tensor(group, device=X.device)
            error[where], random_error[where], optimal[where] = chosen[1:]
            for c, rows in zip(group, chosen[0], strict=True):
                indices[c] = rows
    everything = torch.cat(indices) if indices else X.new_empty(0, dtype=torch.int64)
    return SubsetSelection(everything, error, random_error, optimal)


@torch.library.custom_op("fedgram::subset_select", mutates_args=())
def _subset_select_op(
    X: Tensor, offsets: Sequence[int], counts: Sequence[int], restarts: int, seed: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``torch.compile`` sees of ``subset_select``: boundaries and counts are numbers, known when it traces."""
    chosen = subset_select(X, offsets, counts, restarts=restarts, seed=seed, backend=backend)
    return chosen.indices, chosen.error, chosen.random_error, chosen.swap_optimal


@_subset_select_op.register_fake
def _(
    X: Tensor, offsets: Sequence[int], counts: Sequence[int], restarts: int, seed: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C = len(counts)
    error, random_error = (X.new_empty((C,), dtype=torch.float64) for _ in range(2))
    return X.new_empty((sum(counts),), dtype=torch.int64), error, random_error, X.new_empty((C,), dtype=torch.bool)


def _random_starts(problem: Problem, restarts: int, generator: torch.Generator) -> Tensor:
    """(restarts, m) random subsets, drawn on the CPU so that they are the same on every device."""
    draws = torch.empty((restarts, problem.wanted), dtype=torch.int64, device="cpu")
    for draw in draws:
        draw.copy_(torch.randperm(problem.rows, generator=generator, device="cpu")[: problem.wanted])
    return draws


def _groups(problems: list[Problem], starts: int, width: int) -> list[list[int]]:
    """Classes to search together: of similar size, within the memory limit; those with nothing to choose left out."""
    order = sorted((c for c, problem in enumerate(problems) if problem.wanted), key=lambda c: problems[c].rows)
    groups: list[list[int]] = []
    for c in order:
        rows, together = problems[c].rows, [*(groups[-1] if groups else []), c]
        members = max(problems[d].wanted for d in together)
        size = 8 * rows * (rows + width + 2 * starts * members) * len(together)
        if groups and rows <= GRAM_ROWS and size <= GROUP_BYTES:
            groups[-1].append(c)
        else:
            groups.append([c])
    return groups


def _select(
    X: Tensor, problems: list[Problem], draws: list[Tensor], triton: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Chosen rows of X, errors, random errors and optimality of a group of classes."""
    centred, unit = _centred(X, problems)
    sizes = torch.tensor([problem.rows for problem in problems], device=X.device)
    counts = torch.tensor([problem.wanted for problem in problems], device=X.device)
    rows = MemberRows(centred, sizes, gram=centred.shape[1] <= GRAM_ROWS)
    starts = Starts.empty(rows, counts, max(p.wanted for p in problems), 1 + draws[0].shape[0])
    greedy(rows, starts)
    for c, draw in enumerate(draws):
        starts.members[c, 1:, : draw.shape[1]] = draw.to(X.device)
    if triton:
        from ._subset_select_triton import descend_triton

        with launching_on(X.device):
            optimal = descend_triton(rows, starts)
    else:
        optimal = descend(rows, starts)
    chosen, error, random_error, best_optimal = _best(centred, problems, starts, optimal)
    return chosen, error * unit, random_error * unit, best_optimal


def _centred(X: Tensor, problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """(classes, rows, p) float64 rows about the mean of their class in units (classes,) of it, zeros below.

    The units are powers of two near the largest number of a class, so that its squares are in float64's range; 1 for
    narrower types, whose squares are.
    """
    centred = X.new_zeros((len(problems), max(p.rows for p in problems), X.shape[1]), dtype=torch.float64)
    unit = X.new_ones(len(problems), dtype=torch.float64)
    for c, problem in enumerate(problems):
        rows, own = centred[c, : problem.rows], X[problem.start : problem.stop]
        if X.dtype == torch.float64 and own.numel():
            exponent = torch.frexp(own.abs().amax()).exponent.clamp(-1000, 1000).double()  # 0 for zeros
            unit[c] = torch.exp2(exponent)
            own = own * torch.exp2(-exponent)
        rows.copy_(own)
        rows.sub_(rows.mean(0))
    return centred, unit


def _best(
    centred: Tensor, problems: list[Problem], starts: Starts, optimal: Tensor
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    chosen, errors, random_errors, best_optimal = [], [], [], []
    for c, (start, _, m) in enumerate(problems):
        n = problems[c].rows
        means = centred[c][starts.members[c, :, :m]].mean(1)
        norms = means.norm(dim=1)
        best = norms.argmin()
        chosen.append(start + starts.members[c, best, :m].sort().values)
        errors.append(norms[best])
        variance = centred[c].square().sum() / max(n - 1, 1)
        random_errors.append((variance * ((1 / m) * (1 - m / n))).sqrt())
        best_optimal.append(optimal[c, best])
    return chosen, torch.stack(errors), torch.stack(random_errors), torch.stack(best_optimal)


def _checked_problems(X: Tensor, offsets: Tensor | Sequence[int], counts: Tensor | Sequence[int]) -> list[Problem]:
    if X.ndim != 2 or X.dtype not in FLOATS:
        raise ValueError(f"X: expected (N, p) floats (64, 32 or 16 bit), got {tuple(X.shape)} {X.dtype}")
    if not bool(torch.isfinite(X).all()):
        raise ValueError("X: contains values that are not finite")
    bounds, wanted = checked_offsets(offsets, X.shape[0]), host_integers(counts, "counts")
    if len(wanted) != len(bounds) - 1:
        raise ValueError(f"counts: expected {len(bounds) - 1} numbers, one per class, got {len(wanted)}")
    problems = [Problem(a, b, m) for (a, b), m in zip(itertools.pairwise(bounds), wanted, strict=True)]
    for c, problem in enumerate(problems):
        if not 0 <= problem.wanted <= problem.rows:
            raise ValueError(f"counts[{c}]: expected 0 to {problem.rows} (the size of the class), got {problem.wanted}")
    return problems
