"""Figures of continual learning, from the accuracy matrix ``a[t, i]``: task i's accuracy after training task t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AccuracyMatrix = Sequence[Sequence[float]] | np.ndarray | Tensor


@dataclass(frozen=True)
class ContinualMetrics:
    """The three figures of one run, in the unit of the accuracies given.

    Attributes:
        average_accuracy: mean accuracy over all tasks after the last one.
        average_forgetting: mean loss of accuracy since each earlier task's best (lower is better).
        backward_transfer: mean change of accuracy since each earlier task was learnt (higher is better).
    """

    average_accuracy: float
    average_forgetting: float
    backward_transfer: float


def average_accuracy(a: AccuracyMatrix) -> float:
    """The mean accuracy over all tasks after the last one: ``mean_i a[T-1, i]``.

    Args:
        a: accuracy matrix, shape (T, T). Entries above the diagonal (tasks not learnt yet) are never read, may be NaN.

    Raises:
        ValueError: not a square matrix of at least one task, or an entry on or below the diagonal is not finite.
    """
    return float(_checked(a)[-1].mean())


def average_forgetting(a: AccuracyMatrix) -> float:
    """``mean over i < T-1 of (max over i <= s < T-1 of a[s, i]) - a[T-1, i]``; 0 for a single task.

    The best is taken over the states before the last, as Chaudhry et al. (arXiv:1801.10112, eq. 3) define it: a task
    that ends better than it ever was counts as negative forgetting. Shapes and errors as in ``average_accuracy``.
    """
    a = _checked(a)
    last = len(a) - 1
    return float(np.mean([a[i:last, i].max() - a[last, i] for i in range(last)])) if last else 0.0


def backward_transfer(a: AccuracyMatrix) -> float:
    """``mean over i < T-1 of a[T-1, i] - a[i, i]``; 0 for a single task (Lopez-Paz and Ranzato, arXiv:1706.08840).

    Shapes and errors as in ``average_accuracy``.
    """
    a = _checked(a)
    last = len(a) - 1
    return float(np.mean([a[last, i] - a[i, i] for i in range(last)])) if last else 0.0


def continual_metrics(a: AccuracyMatrix) -> ContinualMetrics:
    """All three figures of one accuracy matrix. Shapes and errors as in ``average_accuracy``."""
    return ContinualMetrics(average_accuracy(a), average_forgetting(a), backward_transfer(a))


def _checked(a: AccuracyMatrix) -> np.ndarray:
    if isinstance(a, Tensor):
        a = a.detach().cpu().to(torch.float64).numpy()  # numpy has no bfloat16
    try:
        matrix = np.asarray(a, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"accuracy matrix: expected numbers of shape (T, T) ({error})") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"accuracy matrix: expected shape (T, T) with T at least 1, got {matrix.shape}")
    bad = np.argwhere(np.tril(~np.isfinite(matrix)))
    if len(bad):
        t, i = bad[0]
        raise ValueError(f"accuracy matrix: entry [{t}, {i}] is {matrix[t, i]}; expected a finite number")
    return matrix
