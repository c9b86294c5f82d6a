"""A model's state beside its parameters as it was: buffers and what they go with, and modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._look import may_look

_OWN = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None), Tensor)


@dataclass(frozen=True, eq=False)
class Kept:
    """What one module held: its buffers, copies of their values, and its attributes that are plain values or tensors.

    Its mode (``training``) is one of these. A cache that grows notes its length in such an attribute: the one is of no
    use without the other.
    """

    module: nn.Module
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]
    plain: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Kept:
        """What the module holds now."""
        values = {name: b.detach().clone() for name, b in module._buffers.items() if b is not None}
        return cls(module, dict(module._buffers), values, _plain(module))

    def put_back(self, changed: set[int]) -> None:
        """Have the module hold it again; ``changed`` are the identities of buffers whose values differ."""
        for name, value in self.values.items():
            if (held := self.buffers[name]) is not None and id(value) in changed:
                held.copy_(value)
        for store, before in ((self.module._buffers, self.buffers), (self.module.__dict__, self.plain)):
            now = store if store is self.module._buffers else _plain(self.module)
            for name in set(now.keys()) - set(before):
                del store[name]
            for name, kept in before.items():  # a scripted module's buffers lack ``update``
                store[name] = kept


def remembered(model: nn.Module) -> list[Kept]:
    """What every module holds; a lazy one holds nothing until it has seen an input."""
    return [Kept.of(module) for module in model.modules() if not _lazy(module)]


def _lazy(module: nn.Module) -> bool:
    held = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and is_lazy(t) for t in held)


@torch.no_grad()
def put_back(kept: list[Kept]) -> None:
    """Have the modules hold what was remembered, also where it was assigned anew, or was None, or is new."""
    # Only what changed: a graph outside may have saved a buffer. Its version counter would not tell, batch
    # normalisation writes past it.
    named = [(one.buffers[name], value) for one in kept for name, value in one.values.items()]
    pairs = [(held, value) for held, value in named if held is not None]
    changed = _differing(pairs)
    for one in kept:
        one.put_back(changed)


def _differing(pairs: list[tuple[Tensor, Tensor]]) -> set[int]:
    """Identities of the values from which the buffers beside them differ, with one wait for every device."""
    same: dict[torch.device, list[tuple[int, Tensor]]] = {}
    changed = {id(value) for _, value in pairs}
    for held, value in pairs:
        if value.layout == torch.strided == held.layout and value.shape == held.shape and may_look(value.device):
            with suppress(RuntimeError):  # types that cannot be compared count as changed
                alike = (held == value) | ((held != held) & (value != value))
                same.setdefault(value.device, []).append((id(value), alike.all()))
    for found in same.values():
        flags = torch.stack([flag for _, flag in found]).tolist()
        changed -= {value for (value, _), flag in zip(found, flags, strict=True) if flag}
    return changed


def _plain(module: nn.Module) -> dict[str, Any]:
    return {n: x for n, x in module.__dict__.items() if n not in _OWN and isinstance(x, _PLAIN)}


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back after the block, also after an error."""
    kept = remembered(model)
    try:
        yield
    finally:
        put_back(kept)
