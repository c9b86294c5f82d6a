"""The small network that learns the tasks, its loss, and its accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stamp_data import CLASSES, PER_TASK

Batch = tuple[Tensor, Tensor]


def new_model(seed: int) -> nn.Module:
    """Two strided convolutions and two linear layers, 106,000 parameters, one head for all ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy over all ten classes."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracies(model: nn.Module, tasks: Sequence[Batch]) -> tuple[list[float], list[float]]:
    """Per task, the accuracy among all classes seen so far, and among the task's own two.

    The first is class-incremental, the second task-incremental (it is told which task an image is from).
    """
    seen = PER_TASK * len(tasks)
    scores = model(torch.cat([X for X, _ in tasks])).split([len(y) for _, y in tasks])
    by_class, by_task = [], []
    for t, (score, (_, y)) in enumerate(zip(scores, tasks, strict=True)):
        first = PER_TASK * t
        by_class.append(_share(score[:, :seen].argmax(1) == y))
        by_task.append(_share(score[:, first : first + PER_TASK].argmax(1) + first == y))
    return by_class, by_task


def _share(right: Tensor) -> float:
    return float(right.double().mean())
