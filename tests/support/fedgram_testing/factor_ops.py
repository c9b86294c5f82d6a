"""Ragged adapters in every memory layout, and float64 references for the factor operations."""

import torch

from .gradients import ALL_BACKENDS, BACKENDS, TYPES, garbage

__all__ = [
    "ALL_BACKENDS",
    "BACKENDS",
    "LAYOUTS",
    "SHAPES",
    "TYPES",
    "draw",
    "garbage",
    "lay",
    "padded",
    "stack_A",
    "stack_B",
]

# (ranks of the clients, (m, n) of the modules): odd, ragged, one client, empty, off every block multiple
SHAPES = {
    "odd ranks": ([1, 3, 5], [(65, 33), (1, 7)]),
    "ragged ranks": ([4, 8, 16, 64], [(130, 104)]),
    "one client": ([4], [(300, 16), (64, 64)]),
    "whole vectors": ([8] * 10, [(96, 136)]),
    "wider than a tile": ([16] * 9, [(70, 72)]),
    "a client of rank 0": ([0, 2], [(9, 9)]),
    "nothing but rank 0": ([0], [(5, 6)]),
    "empty": ([3, 2], [(0, 5), (4, 0)]),
}


def _offset(t, skip=1):
    """The same numbers ``skip`` elements into a larger memory."""
    memory = torch.zeros(t.numel() + skip, dtype=t.dtype)
    memory[skip:] = t.reshape(-1)
    return memory[skip:].view(t.shape)


def _gaps(t):
    """The same numbers as every second column of a wider matrix."""
    return torch.stack([t, t + 1], 2).flatten(1)[:, ::2]


def _rows(t):
    """The same numbers as a column slice: contiguous rows far apart."""
    return torch.cat([t, t], 1)[:, : t.shape[1]]


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "misaligned": _offset,
    "slice of columns": _rows,
    "every second column": _gaps,
}


def draw(ranks, modules, dtype, *, layout="contiguous", seed=0):
    """B[l][u], A[l][u] of every module and client."""
    g = torch.Generator().manual_seed(seed)

    def one(*shape):
        return LAYOUTS[layout](torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))

    return [[one(m, r) for r in ranks] for m, _ in modules], [[one(r, n) for r in ranks] for _, n in modules]


def stack_B(clients):
    return torch.cat([b.double() for b in clients], 1)


def stack_A(clients):
    return torch.cat([a.double() for a in clients], 0)


def padded(t, rank, dim):
    """``t`` with zeros up to ``rank`` along ``dim``, float64."""
    missing = rank - t.shape[dim]
    return torch.nn.functional.pad(t.double(), (0, missing) if dim == 1 else (0, 0, 0, missing))


def lay(layout, t):
    return LAYOUTS[layout](t)
