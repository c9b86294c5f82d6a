"""Numerics under stress: scales, condition numbers, duplicates, cancellation, many clients, dtypes, threads.

What is promised, for clients' factors with entries from 1e-30 to 1e30 (as far as their dtype goes): all sums are in
float64, so a product that would underflow or overflow float32 is nothing special; ``als`` and ``svd`` return balanced
factors of about ``sqrt(||dW||)``, which float32 and bfloat16 can hold; rho is that of the factors as returned.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedgram import flora_na
from fedgram.flora_na import LoraLayer
from fedgram.flora_na import group as group_module
from fedgram_testing.stress import FAMILIES, draw, reference

LADDER = ("svd", "als", "flora-na", "fedavg")


@st.composite
def problems(draw_, most=12):
    """family, clients, rank, m, n, exponents of the scales of B and A, dtype, seed, condition."""
    dtype = draw_(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return (
        draw_(st.sampled_from(FAMILIES)),
        draw_(st.integers(1, most)),
        draw_(st.integers(1, 6)),
        draw_(st.integers(1, 30)),
        draw_(st.integers(1, 30)),
        draw_(st.integers(-30, 30)),
        draw_(st.integers(-30, 30)),
        dtype,
        draw_(st.integers(0, 1000)),
        draw_(st.sampled_from([1e3, 1e6, 1e12])),
    )


def build(family, count, rank, m, n, exponent_B, exponent_A, dtype, seed, condition):
    if family == "gauge" and dtype != torch.float64:  # its factors already span 24 orders
        exponent_B, exponent_A = (max(-12, min(12, e)) for e in (exponent_B, exponent_A))
    B, A = draw(family, count, rank, m, n, condition=condition, seed=seed)
    scale_B, scale_A = 10.0**exponent_B, 10.0**exponent_A
    weights = [1 + (u * 7 + seed) % 5 for u in range(count)]
    if family.endswith("opposite"):
        weights = [1.0] * count
    B, A = [(b * scale_B).to(dtype) for b in B], [(a * scale_A).to(dtype) for a in A]
    return B, A, weights, reference(B, A, weights, scale_B, scale_A)


def check(B, A, weights, ref, rank=None):
    """No NaN, rho true, the ladder, the optimum within its bound; returns the estimates."""
    found = {method: flora_na.estimate(B, A, weights, method=method, rank=rank) for method in LADDER}
    for e in found.values():
        assert torch.isfinite(e.B).all()
        assert torch.isfinite(e.A).all()
    zero = [e.status == "zero-target" for e in found.values()]
    if any(zero):
        assert all(zero)
        assert ref.mass > 1e12  # nothing but rounding is left of what was added up
        return found
    for e in found.values():
        true = ref.divergence(e.B, e.A)
        # three digits down to 1e-6, and to what float64 sums over the clients leave
        assert abs(e.rho - true) <= 5e-4 * true + ref.floor + ref.doubt(e) + 1e-12, (e.rho, true)
        # three digits where much cancels: from there on the norm is taken without Grams
        assert e.norm == pytest.approx(ref.norm * ref.unit, rel=1e-9 + min(2.5e-4, 2.0**-50 * ref.mass**2) + ref.floor)
    for lower, upper in pairwise(LADDER):
        slack = ref.loss(found[lower]) + ref.loss(found[upper]) + ref.floor
        share = (1e-9 if lower == "flora-na" else 1e-6) + ref.blur(found[upper].rho)
        assert found[lower].rho <= found[upper].rho * (1 + share) + slack, {m: e.rho for m, e in found.items()}
    best, optimum = found["svd"], ref.optimum(found["svd"].rank)
    assert best.rho <= optimum * (1 + 1e-6 + ref.blur(optimum)) + ref.loss(best) + ref.floor
    assert best.rho >= ref.optimum(best.rank) * (1 - 1e-6) - ref.floor
    # the balanced pair is no larger than it has to be, so its rounding is that of dW: sqrt(r) eps ||dW||
    assert ref.loss(best) <= torch.finfo(best.B.dtype).eps * best.rank**0.5 * (1 + ref.floor) * 1.01
    return found


@settings(deadline=None, max_examples=100, derandomize=True)
@given(problems())
@example(("nearly-opposite", 30, 3, 40, 17, 0, 0, torch.float64, 1, 1e12))
@example(("gauge", 30, 3, 40, 17, -30, 30, torch.float64, 1, 1e12))
@example(("one-ill", 8, 3, 1, 3, 0, 0, torch.float64, 0, 1e12))
@example(("gauge", 7, 6, 9, 8, 0, 0, torch.float32, 1, 1e12))
@example(("ill", 30, 3, 40, 17, 30, 30, torch.float64, 1, 1e12))
@example(("opposite", 12, 4, 20, 20, -30, -30, torch.float32, 1, 1e12))
def test_any_family_at_any_scale(problem):
    check(*build(*problem))


@settings(deadline=None, max_examples=30, derandomize=True)
@given(problems(most=6), st.integers(1, 40))
@example(("ill", 2, 5, 2, 2, 0, 0, torch.float64, 4, 1e12), 1)
def test_any_output_rank(problem, rank):
    check(*build(*problem), rank=rank)


@pytest.mark.parametrize(
    ("family", "count", "rank"),
    [
        ("common", 150, 3),
        ("common", 300, 4),
        ("nearly-opposite", 150, 3),
        ("nearly-opposite", 300, 4),
        ("duplicates", 300, 4),
        ("opposite", 300, 4),
        ("gauge", 150, 3),
        ("gauge", 100, 12),
    ],
)
def test_hundreds_of_clients(family, count, rank):
    """In both regimes (total rank 450 from Grams, 1200 without) and far more rank than dimensions."""
    check(*build(family, count, rank, 24, 18, -30, 30, torch.float64, 0, 1e6))


@pytest.mark.parametrize("exponent", [0, -30])
@pytest.mark.parametrize(
    ("family", "count", "rank", "m", "n"),
    [
        ("ill", 7, 6, 9, 8),
        ("one-ill", 8, 3, 10, 20),
        ("one-ill", 30, 3, 40, 50),
        ("nearly-opposite", 12, 3, 40, 17),
        ("hollow", 7, 6, 9, 8),
    ],
)
def test_hard_families_without_grams(family, count, rank, m, n, exponent, monkeypatch):
    monkeypatch.setattr(group_module, "GRAM_RANK_LIMIT", 0)
    dtype = torch.float64 if exponent == 0 else torch.float32
    check(*build(family, count, rank, m, n, exponent, exponent, dtype, 0, 1e12))


@pytest.mark.parametrize("anchored", [False, True])
def test_hundreds_of_clients_that_are_multiples_of_one(anchored):
    """By conjugate gradients: the step along a direction that only rounding points to would have no end."""
    g = torch.Generator().manual_seed(0)
    b, a, *base = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, 1), (1, 25), (9, 1), (1, 25)))
    B, A = [b * (1 + u / 520) for u in range(520)], [a * (3 - u / 260) for u in range(520)]
    e = flora_na.estimate(B, A, method="flora-na", anchor=tuple(base) if anchored else None)
    assert e.status == "converged"
    assert e.rho < 1e-9 < 1e-3 < e.rho_fedavg


@pytest.mark.parametrize("method", [*LADDER, "stack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponents", [(-30, -30), (30, 30), (-30, 30), (30, -25)])
def test_products_outside_the_dtype_are_kept_in_factors(method, dtype, exponents):
    """B A has entries of 1e-60 or 1e60, which float32 has not: the pair that stands for it has."""
    B, A, weights, ref = build("common", 5, 4, 20, 30, *exponents, dtype, 0, 1e12)
    e = flora_na.estimate(B, A, weights, method=method)
    assert (B[0] @ A[0]).isfinite().all() == (sum(exponents) < 38)
    assert e.rho == pytest.approx(ref.divergence(e.B, e.A), rel=5e-4, abs=1e-12)
    bounds = {"svd": ref.optimum(e.rank), "als": ref.optimum(e.rank) + 1e-3, "stack": 0.0}
    if method in bounds:
        assert e.rho <= bounds[method] + ref.loss(e)
    if method in ("als", "svd"):
        assert float(e.B.double().norm()) == pytest.approx(float(e.A.double().norm()), rel=1e-2)


def test_clients_are_compared_at_any_scale():
    B, A, _, _ = build("common", 6, 4, 20, 30, -30, -30, torch.float32, 0, 1e12)
    B[2] = -5 * B[2]
    found = flora_na.inspect([{"m": LoraLayer(A=a, B=b)} for b, a in zip(B, A, strict=True)])
    plain = flora_na.inspect(
        [{"m": LoraLayer(A=a.double() * 1e30, B=b.double() * 1e30)} for b, a in zip(B, A, strict=True)]
    )
    assert torch.allclose(found.client_norms * 1e60, plain.client_norms, rtol=1e-9)
    assert torch.allclose(found.cosines_to_mean, plain.cosines_to_mean, atol=1e-9)
    assert torch.allclose(found.outlier_scores, plain.outlier_scores, rtol=1e-6)
    assert found.modules["m"].rank_curve == pytest.approx(plain.modules["m"].rank_curve, rel=1e-6, abs=1e-9)
    assert found.modules["m"].effective_rank == pytest.approx(plain.modules["m"].effective_rank, rel=1e-6)


@pytest.mark.parametrize("family", ["ill", "gauge", "nearly-opposite", "hollow"])
def test_float16_loses_its_own_rounding_only(family):
    """Where its factors stay among float16's normal numbers; below them entries are held to 3e-8 absolutely."""
    B, A, weights, ref = build(family, 6, 4, 20, 30, 0, 0, torch.float16, 3, 1e2)
    found = check(B, A, weights, ref)
    assert found["svd"].rho <= ref.optimum(4) + 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("method", ["als", "svd"])
@pytest.mark.parametrize("condition", [1e3, 1e12])
def test_the_split_over_the_factors_leaves_no_trace(method, condition):
    """(cB, A / c), with c of 1e-12 to 1e12 per client: the same update, the same result."""
    B, A, weights, ref = build("common", 7, 6, 9, 8, 0, 0, torch.float64, 2, 1.0)
    c = [condition ** (u % 3 - 1) for u in range(7)]
    split = [b * x for b, x in zip(B, c, strict=True)], [a / x for a, x in zip(A, c, strict=True)]
    one, other = (flora_na.estimate(*f, weights, method=method) for f in ((B, A), split))
    tolerance = 1e-6 if method == "svd" else 2e-2  # als stops by a tolerance, on its way from another flora-na
    assert float((one.B @ one.A - other.B @ other.A).norm()) <= tolerance * ref.norm
    assert one.rho == pytest.approx(other.rho, rel=1e-9 if method == "svd" else 1e-4)


@pytest.mark.parametrize("count", [5, 60])
def test_the_same_bits_every_time_and_the_same_numbers_on_any_number_of_threads(count):
    B, A, weights, ref = build("common", count, 4, 160, 200, 0, 0, torch.float32, 0, 1.0)
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 1, 2, 2):
            torch.set_num_threads(number)
            runs.append({m: flora_na.estimate(B, A, weights, method=m) for m in ("fedavg", "flora-na", "als", "svd")})
    finally:
        torch.set_num_threads(threads)
    for one, again in (runs[:2], runs[2:]):
        for method, e in one.items():
            assert torch.equal(e.B, again[method].B), method
            assert torch.equal(e.A, again[method].A), method
            assert e.rho == again[method].rho
    for method, e in runs[0].items():
        other = runs[2][method]
        difference = e.B.double() @ e.A.double() - other.B.double() @ other.A.double()
        assert float(difference.norm()) <= 2 * ref.loss(e) * ref.norm + 1e-9 * ref.norm, method
        assert e.rho == pytest.approx(other.rho, rel=1e-6)


@pytest.mark.parametrize("method", LADDER)
def test_zero_and_empty_targets(method):
    zero = [torch.zeros(6, 3)] * 2, [torch.ones(3, 7)] * 2
    nothing = [torch.zeros(6, 0)] * 2, [torch.zeros(0, 7)] * 2
    flat = [torch.zeros(0, 3)] * 2, [torch.ones(3, 7)] * 2
    for B, A in (zero, nothing, flat):
        e = flora_na.estimate(B, A, method=method)
        assert e.status == "zero-target"
        assert math.isnan(e.rho)
        assert math.isnan(e.rho_fedavg)
        assert math.isnan(e.rho_optimal)
        assert (e.B.shape, e.A.shape) == (B[0].shape, A[0].shape)
        assert not (e.B @ e.A).any()
