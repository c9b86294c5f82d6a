"""What the inner products of the clients' updates say of them: norms, cosines, outliers. Nothing else is read."""

from __future__ import annotations

import torch
from torch import Tensor

RESOLVED = {"cpu": 1e-7, "cuda": 2e-3}
"""Distances below this part of the norms are rounding: the square root of what the inner products resolve."""
OUTLIER, JUDGES = 3.0, 5
"""A client whose outlier score is above the first is reported, if there are as many clients as the second."""
SPREAD = 0.05
"""Outlier scores take the spread of the distances as at least this part of their median."""


def norms_of(gramian: Tensor) -> Tensor:
    """(U,) norms from (U, U) inner products."""
    return gramian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()


def cosines(gramian: Tensor) -> Tensor:
    """(U, U) cosines from inner products, within [-1, 1]; 0 where a norm is zero."""
    norms = norms_of(gramian)
    return ratio(gramian, norms.unsqueeze(1) * norms).clamp(-1.0, 1.0)


def mean_norm(gramian: Tensor, weights: Tensor) -> Tensor:
    """The norm of the weighted mean update."""
    return (weights @ gramian @ weights).clamp_min(0).sqrt()


def mean_cosines(gramian: Tensor, weights: Tensor) -> Tensor:
    """(U,) cosine of every update to the weighted mean update, its own part included; 0 where a norm is zero.

    A mean that has cancelled to rounding beside the updates has no direction: all cosines are then 0.
    """
    norms = norms_of(gramian)
    mean = mean_norm(gramian, weights)
    mean = torch.where(mean > _resolved(gramian) * (weights @ norms), mean, 0.0)
    return ratio(gramian @ weights, norms * mean).clamp(-1.0, 1.0)


def outlier_scores(gramian: Tensor) -> Tensor:
    """(U,) robust z-scores of the distance of every update to the unweighted mean of the others.

    ``(x - median) / (1.4826 * MAD)`` (Iglewicz and Hoaglin): above 3 or so a client is far out. Zeros with fewer than
    three clients; with fewer than five they say little. The spread ``1.4826 * MAD`` is taken as at least 5 % of the
    median distance, and as what the inner products resolve, so that near-equal clients and rounding score nothing.
    """
    clients = gramian.shape[0]
    if clients < 3:
        return torch.zeros(clients, dtype=gramian.dtype, device=gramian.device)
    eye = torch.eye(clients, dtype=gramian.dtype, device=gramian.device)
    offset = eye - (1.0 - eye) / (clients - 1)
    distance = (offset @ gramian @ offset.mT).diagonal().clamp_min(0).sqrt()
    median = distance.quantile(0.5)
    deviation = 1.4826 * (distance - median).abs().quantile(0.5)
    floor = torch.maximum(SPREAD * median, _resolved(gramian) * norms_of(gramian).max())
    return ratio(distance - median, torch.maximum(deviation, floor))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)


def _resolved(gramian: Tensor) -> float:
    return RESOLVED.get(gramian.device.type, RESOLVED["cuda"])
