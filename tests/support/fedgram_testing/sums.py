"""Cases of ``lowrank_sum``, and what its results may miss."""

import torch

from .factor_ops import draw, lay

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def case(ranks, m, n, dtype, w_dtype=None, layout="contiguous"):
    (B,), (A,) = draw(ranks, [(m, n)], dtype, layout=layout)
    g = torch.Generator().manual_seed(3)
    W = torch.randn(m, n, generator=g, dtype=torch.float64).to(w_dtype or dtype)
    return lay(layout, W), B, A, torch.randn(len(ranks), generator=g, dtype=torch.float64)


def check(got, W, B, A, c, beta, *, sum_type):
    """One rounding of the output type, after a sum in ``sum_type``.

    float64 sums lose R eps; 32-bit ones R 2^-24 at the worst, and tf32x3 products 2^-21; both relative to the terms.
    """
    terms = [w * (b.double() @ a.double()) for w, b, a in zip(c, B, A, strict=True)]
    sizes = [w.abs() * (b.double().abs() @ a.double().abs()) for w, b, a in zip(c, B, A, strict=True)]
    exact, size = sum(terms), sum(sizes)
    if W is not None:
        exact, size = exact + beta * W.double(), size + abs(beta) * W.double().abs()
    ranks = sum(b.shape[1] for b in B) + 2
    summing = {torch.float64: ranks * 2.0**-52, torch.float32: 2.0**-21 + ranks * 2.0**-24}[sum_type]
    smallest = 2.0**-25 if got.dtype == torch.float16 else 0.0  # half the spacing of float16 near zero
    allowed = EPS[got.dtype] / 2 * exact.abs() + summing * size + smallest
    assert bool(((got.double() - exact).abs() <= allowed).all())


def sum_type(backend, dtype, out):
    """What the docstrings promise: only the twin sums in float64 where no type is float64, for float32 outputs."""
    if torch.float64 in (dtype, out) or (backend == "torch" and out == torch.float32):
        return torch.float64
    return torch.float32
