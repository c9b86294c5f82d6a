"""Random clients and dense float64 references for LoRA aggregation."""

import torch

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def clients(ranks, m, n, *, common=1.0, spread=0.5, scale=1.0, dtype=torch.float32, seed=0):
    """Factors of len(ranks) clients around a common part, with entries of size ``scale``."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    top = max(ranks)
    A0, B0 = draw(top, n), draw(m, top)
    A = [(scale * (common * A0[:r] + spread * draw(r, n))).to(dtype) for r in ranks]
    B = [(scale * (common * B0[:, :r] + spread * draw(m, r))).to(dtype) for r in ranks]
    return B, A


def dense(B, A, weights=None, scalings=None):
    """``sum w_u s_u B_u A_u`` in float64."""
    w = torch.ones(len(B), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    s = torch.ones(len(B), dtype=torch.float64) if scalings is None else torch.as_tensor(scalings, dtype=torch.float64)
    w = w / w.sum() * s
    return sum(c * b.double() @ a.double() for c, b, a in zip(w, B, A, strict=True))


def dense_target(adapters, name, weights=None):
    """``dense`` of one module of adapters."""
    layers = [a.modules[name] for a in adapters]
    return dense([x.B for x in layers], [x.A for x in layers], weights, [x.scaling for x in layers])


def convolution(*kernel):
    """A client's state dict of one convolution, of 3 channels to 4, rank 2."""
    return {"c.lora_A.weight": torch.ones(2, 3, *kernel), "c.lora_B.weight": torch.ones(4, 2, 1, 1)}


def divergence(W, B, A):
    """``||W - BA|| / ||W||`` in float64."""
    return float((W - B.double() @ A.double()).norm() / W.norm())


def optimum(W, rank):
    """rho of the best pair of the rank, from a dense SVD in float64."""
    s = torch.linalg.svdvals(W)
    return float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt())


def rounding(B, A, weights=None, scalings=None):
    """What rounding the returned pair to the dtype may add to rho, as a first-order bound.

    Entries of B and A carry a relative eps/2 each, so the product moves by at most eps ||B|| ||A||; balanced pairs
    have ||B|| ||A|| <= sqrt(r) ||dW||, averaged ones at most the sum of the clients' products of norms.
    """
    w = torch.ones(len(B)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    s = torch.ones(len(B)) if scalings is None else torch.as_tensor(scalings, dtype=torch.float64).abs()
    w = (w / w.sum() * s).tolist()
    mass = sum(c * float(b.double().norm() * a.double().norm()) for c, b, a in zip(w, B, A, strict=True))
    size = float(dense(B, A, weights, scalings).norm())
    return EPS[B[0].dtype] * (mass / size if size else 1.0) * max(b.shape[1] for b in B) ** 0.5
