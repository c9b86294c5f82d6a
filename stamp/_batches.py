"""The batches that callers hand to temporal matching: so many of a stream, and on the device of the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch


def first(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """The first ``steps`` of the batches, or an error where there are fewer."""
    source = iter(batches)
    for step in range(steps):
        try:
            yield next(source)
        except StopIteration:
            raise ValueError(f"batches: {step} given, {steps} steps need as many") from None


def to_device(batch: Any, device: torch.device | None) -> Any:
    """A batch on the device: what has a ``.to`` by that, tuples, lists and mappings part by part, in their own type."""
    if device is None:
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(part, device) for key, part in batch.items()}
        if all(moved[key] is part for key, part in batch.items()):
            return batch
        if not isinstance(batch, MutableMapping):
            return moved
        whole = copy.copy(batch)
        for key, part in moved.items():  # some, such as transformers' outputs, refuse ``update``
            whole[key] = part
        return whole
    if not isinstance(batch, tuple | list):
        return batch
    parts = [to_device(part, device) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
