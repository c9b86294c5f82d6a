"""Whole adapters of some clients, in memory."""

import torch

from fedgram.flora_na import Adapter, LoraLayer

from .factors import clients

SHAPES = {"layer.0.query": (20, 30), "layer.0.value": (12, 30), "layer.1.query": (20, 30)}


def cohort(count=4, ranks=None, seed=0, scaling=2.0):
    """Adapters of ``count`` clients over SHAPES."""
    ranks = [3] * count if ranks is None else ranks
    modules = [{} for _ in range(count)]
    for i, (name, (m, n)) in enumerate(SHAPES.items()):
        B, A = clients(ranks, m, n, seed=seed + i)
        for u in range(count):
            modules[u][name] = LoraLayer(A=A[u], B=B[u], scaling=scaling)
    extras = [{"classifier.weight": torch.full((2, 3), float(u))} for u in range(count)]
    return [Adapter(mod, ex, {"r": 3}) for mod, ex in zip(modules, extras, strict=True)]
