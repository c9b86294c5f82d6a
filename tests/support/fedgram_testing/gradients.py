"""Lists of gradient tensors, the float64 triple of their Gram, and outputs that start as garbage."""

import contextlib

import pytest
import torch

from fedgram.kernels import native_calls

SHAPES = [(9, 33), (64,), (17, 3), (0,), (1,), ()]
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("torch", "triton")
CPU_BACKENDS = ("native", "torch") if native_calls.missing() is None else ("torch",)
ALL_BACKENDS = (*CPU_BACKENDS, "triton")  # of the operations with compiled CPU loops


def gradients(K, shapes=SHAPES, dtype=torch.float32, *, common=0.0, spread=1.0, seed=0):
    """K lists of tensors ``common * g + spread * random``."""
    g = torch.Generator().manual_seed(seed)
    shared = [common * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [
        [(s + spread * torch.randn(s.shape, generator=g, dtype=torch.float64)).to(dtype) for s in shared]
        for _ in range(K)
    ]


def stacked(G):
    """(K, d) float64."""
    return torch.stack(
        [torch.cat([torch.zeros(0, dtype=torch.float64), *(t.double().reshape(-1) for t in g)]) for g in G]
    )


def triple(G, weights=None):
    """n0, h, H of the gradients as stored, in float64."""
    F = stacked(G)
    u = torch.ones(len(G), dtype=torch.float64) if weights is None else weights.double()
    g0 = (u / u.sum()) @ F
    E = F - g0
    return g0 @ g0, E @ g0, E @ E.T


def errors(got, G, weights=None):
    """Largest errors of n0, h and H relative to the norms of what is multiplied."""
    n0, h, H = triple(G, weights)
    e, tiny = H.diagonal().sqrt(), 1e-300
    return (
        float((got.n0 - n0).abs() / (n0 + tiny)),
        float(((got.h - h).abs() / (n0.sqrt() * e + tiny)).max()),
        float(((got.H - H).abs() / (e[:, None] * e[None, :] + tiny)).max()),
    )


@pytest.fixture
def garbage(monkeypatch):
    """Memory from ``torch.empty`` and its kin starts as NaN: what nobody wrote shows."""

    def filled(make):
        def poisoned(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@contextlib.contextmanager
def threads(count):
    """So many threads within torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
