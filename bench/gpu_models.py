"""The GPU script's models: all clients' adapters in pinned memory, seen as views, sent to the device when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgram.flora_na import LoraLayer

from .ceilings import Cost, rate_of


@dataclass(frozen=True)
class Model:
    """Adapters of a whole model: modules (m, n), clients, rank, type."""

    name: str
    shapes: Sequence[tuple[int, int]]
    clients: int
    rank: int
    dtype: torch.dtype


class Pinned:
    """All clients' factors of a model in one slab of host memory, pinned where there is a GPU; drawn on the device."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], clients: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes, self.clients, self.rank, self.device = shapes, clients, rank, device
        sizes = [clients * rank * (m + n) for m, n in shapes]
        self.host = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
        random = torch.Generator(device=device).manual_seed(0)
        for part in self.host.split(sizes):  # a part common to all clients, and one of their own
            rows = torch.randn(clients + 1, part.numel() // clients, generator=random, device=device)
            part.copy_((rows[0] + 1.5 * rows[1:]).mul_(0.02).flatten())

    def layers(self, slab: Tensor) -> list[dict[str, LoraLayer]]:
        """The clients' adapters as views of a slab of this layout."""
        found: list[dict[str, LoraLayer]] = [{} for _ in range(self.clients)]
        at = 0
        for l, (m, n) in enumerate(self.shapes):
            for client in found:
                B = slab[at : at + m * self.rank].view(m, self.rank)
                at += m * self.rank
                A = slab[at : at + n * self.rank].view(self.rank, n)
                at += n * self.rank
                client[f"layer{l}"] = LoraLayer(A=A, B=B)
        return found

    def cost(self) -> Cost:
        """Reading every factor once, both Gram matrices by symmetry, writing one pair."""
        R, numbers = self.clients * self.rank, self.host.numel()
        flops = sum(m + n for m, n in self.shapes) * R * (R + 2 * self.rank)
        size = self.host.itemsize
        return Cost(
            flops, numbers * size * (1 + 1 / self.clients), numbers * size, rate_of(self.host.dtype, self.device)
        )


class Arriving(Mapping[str, LoraLayer]):
    """An adapter whose layers are sent to the device when they are asked for."""

    def __init__(self, layers: Mapping[str, LoraLayer], device: torch.device) -> None:
        self.layers, self.device = layers, device

    def __getitem__(self, name: str) -> LoraLayer:
        layer = self.layers[name]
        A, B = (t.to(self.device, non_blocking=True) for t in (layer.A, layer.B))
        return LoraLayer(A=A, B=B, scaling=layer.scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
