"""Gram matrices brought to a size whose products neither overflow nor vanish: by powers of two, which cost no digit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ._problem import Array
from .gramian import Gramian

SAFE = 1e-80, 1e80  # the solvers multiply up to three entries


def in_range(given: Gramian | Array) -> tuple[Gramian | Array, float]:
    """One Gram matrix divided by ``root^2``, and ``root``; what the dual says in its unit is to be multiplied by it."""
    if isinstance(given, Gramian):
        top = max(float(part.abs().max()) for part in (given.n0, given.h, given.H))
    else:
        top = float(np.abs(given).max())
    if top == 0 or SAFE[0] < top < SAFE[1]:
        return given, 1.0
    root = math.ldexp(1.0, math.frexp(top)[1] // 2)
    if not isinstance(given, Gramian):
        return given / root / root, root
    n0, h, H = (part / root / root for part in (given.n0, given.h, given.H))
    return replace(given, n0=n0, h=h, H=H), root


def batch_in_range(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same for a batch (B, ...) in float64 on any device, without a look at it: ``root`` has shape (B,)."""
    top = torch.stack([part.abs().reshape(len(part), -1).amax(-1) for part in parts]).amax(0)
    half = ((top.view(torch.int64) >> 52) - 1023) >> 1  # half of the binary exponent, from the bits of the number
    down, root = (((sign * half + 1023) << 52).view(torch.float64) for sign in (-1, 1))
    downs = [down.reshape(-1, *[1] * (part.ndim - 1)) for part in parts]
    return tuple(part * d * d for part, d in zip(parts, downs, strict=True)), root
