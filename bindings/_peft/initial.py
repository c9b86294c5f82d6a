"""PiSSA, OLoRA, CorDA and LoRA-GA: the update of the original base weights is ``s (B A - B0 A0)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fedgram.flora_na import Adapter, LoraLayer

from .config import mutating_init
from .lazy_tensors import LazyMapping
from .merging import BASE, AdapterConfig, check_shared


def since(adapter: Adapter, start: Adapter, label: str) -> Adapter:
    """The client's update since its initial factors, as LoRA of twice the rank.

    These initialisations put ``s B0 A0`` into the adapter and take it out of the base weights ``W``, so that training
    ends at ``W - s B0 A0 + s B A``. The result is an adapter of the original ``W``.

    Args:
        adapter: as trained.
        start: as initialised; the same for all clients.
        label: of the client, for messages.

    Raises:
        ValueError: the start is an adapter of another base model or has no such module; where a layer is read, also if
            rank, shape or scaling differ.
    """
    check_shared([start.config, adapter.config], ["the initial adapter (init)", label], BASE)
    for name in adapter.modules:
        if name not in start.modules:
            raise ValueError(f"{label}: {name}: the initial adapter (init) has no such module")
    config = None if adapter.config is None else AdapterConfig({**adapter.config, "init_lora_weights": True})

    def layer(name: str) -> LoraLayer:
        return _since(adapter.modules[name], start.modules[name], f"{label}: {name}")

    own, initial = (getattr(mapping, "files", None) for mapping in (adapter.modules, start.modules))
    files = None if own is None or initial is None else (*own, *initial)
    sizes = None if (own_sizes := getattr(adapter.modules, "sizes", None)) is None else partial(_doubled, own_sizes)
    return Adapter(LazyMapping(adapter.modules, layer, files, sizes), adapter.extras, config, adapter.roles)


def _doubled(sizes: Callable[[str], tuple[int, int, int]], name: str) -> tuple[int, int, int]:
    m, n, r = sizes(name)
    return m, n, 2 * r


def check_same_start(configs: Sequence[Mapping[str, Any] | None], labels: Sequence[str]) -> None:
    """Refuse clients whose configurations state different initialisations: they did not start from one adapter.

    Raises:
        ValueError: names two clients.
    """
    kinds = [mutating_init((config or {}).get("init_lora_weights")) for config in configs]
    for kind, label in zip(kinds, labels, strict=True):
        if kind != kinds[0]:
            raise ValueError(f"{label}: init_lora_weights {kind} differs from {kinds[0]} of {labels[0]}")


def _since(layer: LoraLayer, first: LoraLayer, where: str) -> LoraLayer:
    """A layer with the initial one subtracted."""
    for what, mine, its in (
        ("rank", layer.rank, first.rank),
        ("shape", layer.shape, first.shape),
        ("scaling", layer.scaling, first.scaling),
    ):
        if mine != its:
            raise ValueError(f"{where}: {what} {mine} differs from {its} of the initial adapter (init)")
    dtype = torch.promote_types(layer.A.dtype, first.A.dtype)
    A = torch.cat([layer.A.to(dtype), first.A.to(dtype)])
    B = torch.cat([layer.B.to(dtype), -first.B.to(dtype)], 1)
    return LoraLayer(A=A, B=B, scaling=layer.scaling)
