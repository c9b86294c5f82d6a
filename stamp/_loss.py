"""The loss function that callers give, and what it must return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]


def checked_loss(loss: Any, task: str) -> Tensor:
    """What ``loss_fn`` returned for a task, shape ().

    Raises:
        ValueError: it is not one floating-point number, or no trainable parameter is behind it; names the task.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected one floating-point number for {task}, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"loss_fn: the loss of {task} depends on no trainable parameter")
    return loss.reshape(())
