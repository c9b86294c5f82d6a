"""When a tensor's values may be looked at."""

from __future__ import annotations

import torch


def may_look(device: torch.device) -> bool:
    """Whether values may be looked at: except while a graph is traced or captured, which holds for any values."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())
