"""Clients that remember what was read of them."""

import time
from collections.abc import Mapping

import torch

from fedgram.flora_na import LoraLayer

LAYER_BYTES = 2 * 4 * 8 * 4  # of both factors of rank 4 of an 8 x 8 module in float32


class Counted(Mapping):
    """Layers that remember which of them were read, in order."""

    def __init__(self, layers):
        self.layers, self.reads = layers, []

    def __getitem__(self, name):
        self.reads.append(name)
        return self.layers[name]

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)

    def __contains__(self, name):
        return name in self.layers


class Recorded(Counted):
    """Layers of the modules named, made when they are asked for; ``broken`` are those that cannot be."""

    def __init__(self, modules, seed=0, broken=(), r=4):
        super().__init__(dict.fromkeys(modules))
        self.seed, self.broken, self.r = seed, broken, r

    def __getitem__(self, name):
        if name in self.broken:
            raise ValueError(f"{name}: cannot be read")
        self.reads.append(name)
        generator = torch.Generator().manual_seed(self.seed)
        A, B = torch.randn(self.r, 8, generator=generator), torch.randn(8, self.r, generator=generator)
        return LoraLayer(A=A, B=B)


def names(count):
    return [f"m{i}" for i in range(count)]


def settled(values):
    """Wait until a list has not grown for 0.4 s (what makes it grow may wait for a core); its length."""
    before, since = len(values), time.monotonic()
    while time.monotonic() - since < 0.4:
        time.sleep(0.05)
        if len(values) != before:
            before, since = len(values), time.monotonic()
    return before
