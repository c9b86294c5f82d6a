"""Tensors from numpy arrays and back, as the frameworks carry them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def from_numpy(values: np.ndarray) -> Tensor:
    """An array as a tensor, in place where it is writable and of this machine's byte order.

    Raises:
        TypeError: torch has no such dtype.
    """
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["W", "C"]))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, in place where it can be; bfloat16, which numpy lacks, becomes float32, which is exact.

    Raises:
        TypeError, RuntimeError: it has no dense values, or a dtype that numpy lacks.
    """
    values = tensor.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
