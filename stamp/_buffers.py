"""A model's buffers as they were: the same tensors with the same values, none where there was none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .dual import looked_at

Buffers: TypeAlias = list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]]


def remembered(model: nn.Module) -> Buffers:
    """Per module its buffers and copies of their values."""
    return [
        (m, dict(m._buffers), {name: b.detach().clone() for name, b in m._buffers.items() if b is not None})
        for m in model.modules()
    ]


@torch.no_grad()
def put_back(buffers: Buffers) -> None:
    """Have the modules hold what was remembered, also where a buffer was assigned anew, or was None, or new."""
    for module, held, values in buffers:
        for name, value in values.items():
            # Only where it changed: a graph outside may have saved the buffer. Its version counter would not tell,
            # batch normalisation writes past it.
            if not (looked_at(value.device) and torch.equal(held[name], value)):
                held[name].copy_(value)
        for name in set(module._buffers.keys()) - set(held):
            del module._buffers[name]
        for name, buffer in held.items():
            module._buffers[name] = buffer


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back after the block, also after an error."""
    kept = remembered(model)
    try:
        yield
    finally:
        put_back(kept)
