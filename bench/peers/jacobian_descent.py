"""TorchJD's autogram engine: the Gram matrix of per-task gradients of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .optional import need

NAME = "TorchJD autogram engine"


def autogram(model: nn.Module, losses: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a run that computes the (K, K) Gram matrix of the K ``losses()``, batched over dimension 0."""
    (module,) = need(NAME, "torchjd.autogram")
    engine = module.Engine(model, batch_dim=0)
    return lambda: engine.compute_gramian(losses())
