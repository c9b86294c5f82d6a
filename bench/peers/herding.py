"""Choosing prototypes: herding and random subsets, from their formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def herding(X: Tensor, y: Tensor, per_class: int) -> Tensor:
    """Indices chosen one by one, each the sample that brings the mean of the chosen nearest the mean of its class."""
    chosen = []
    for label in y.unique():
        rows = (y == label).nonzero().squeeze(1)
        features = X[rows]
        mean = features.mean(0)
        total, free = torch.zeros_like(mean), torch.ones(len(rows), dtype=torch.bool, device=X.device)
        for step in range(1, per_class + 1):
            distance = ((total + features) / step - mean).norm(dim=1)
            distance[~free] = torch.inf
            best = int(distance.argmin())
            total, free[best] = total + features[best], False
            chosen.append(rows[best])
    return torch.stack(chosen)


def random_subset(X: Tensor, y: Tensor, per_class: int) -> Tensor:
    """Indices of random samples of every class."""
    random = torch.Generator().manual_seed(0)
    parts = []
    for label in y.unique():
        rows = (y == label).nonzero().squeeze(1)
        parts.append(rows[torch.randperm(len(rows), generator=random)[:per_class].to(rows.device)])
    return torch.cat(parts)
