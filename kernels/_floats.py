"""The number types that the operations take."""

from __future__ import annotations

import torch

FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
