"""A pair combined and measured in one read: it is ``factor_combine``'s, and the products are ``factor_cross``'s."""

import pytest
import torch

from fedgram.kernels import combine_products, described, factor_combine, factor_cross, native_calls, prepare
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, SHAPES, TYPES, draw, garbage
from fedgram_testing.gradients import threads

__all__ = ["garbage"]
EPS64 = 2.0**-52
PROMISE = 2e-6
built = pytest.mark.skipif(native_calls.missing() is not None, reason=str(native_calls.missing()))


def blocks(B, rank, seed=3):
    g = torch.Generator().manual_seed(seed)
    R = [sum(b.shape[1] for b in bs) for bs in B]
    P = [torch.randn(r, rank, generator=g, dtype=torch.float64) for r in R]
    return P, [torch.randn(rank, r, generator=g, dtype=torch.float64) for r in R]


def scalars(B, seed=3):
    g = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(len(bs), generator=g, dtype=torch.float64) for bs in B] for _ in range(2))


def check(B, A, P, Q, products=300 * EPS64, **options):
    (left, right), (X_B, X_A) = combine_products(B, A, P, Q, **options)
    want_B, want_A = factor_combine(B, A, P, Q, **options)
    for got, want in zip([*left, *right], [*want_B, *want_A], strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        # one order of the sum or another before the one rounding: a unit in the last place, seldom
        unit = torch.finfo(got.dtype).eps
        assert torch.allclose(got.double(), want.double(), rtol=2 * unit, atol=1e-13)
        assert got.dtype == torch.float64 or int((got != want).sum()) <= 0.01 * got.numel()
    beside_B = [[*bs, b] for bs, b in zip(B, left, strict=True)]
    beside_A = [[*as_, a] for as_, a in zip(A, right, strict=True)]
    exact_B, exact_A = factor_cross(beside_B, beside_A, left, right, backend="torch")
    sides = [(X_B, exact_B, beside_B, left, 0), (X_A, exact_A, beside_A, right, 1)]
    for got, want, stacks, x, dim in sides:
        for g, w, clients, own in zip(got, want, stacks, x, strict=True):
            assert g.shape == w.shape
            norms = torch.cat([t.double().norm(dim=dim) for t in clients])
            scale = (norms[:, None] * own.double().norm(dim=dim)[None, :]).clamp_min(1e-300)
            assert not g.numel() or float(((g - w).abs() / scale).max()) <= products


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_it_is_a_combination_and_its_products(backend, dtype, case, garbage):
    ranks, modules = SHAPES[case]
    tolerance = PROMISE if backend == "triton" and dtype != torch.float64 else 300 * EPS64
    B, A = draw(ranks, modules, dtype)
    check(B, A, *scalars(B), tolerance, backend=backend)
    for rank in (1, 7, 8, 20):
        check(B, A, *blocks(B, rank), tolerance, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout, garbage):
    B, A = draw([8, 8, 8], [(48, 40), (133, 65)], torch.bfloat16, layout=layout)
    check(B, A, *scalars(B), PROMISE, backend=backend)
    check(B, A, *blocks(B, 9), PROMISE, backend=backend)


@pytest.mark.parametrize("ranks", [[16, 16, 16], [8] * 10, [32, 32], [4, 4], [24] * 3])
def test_scalars_of_members_that_fill_panels_or_do_not(ranks, garbage):
    B, A = draw(ranks, [(700, 515), (9, 1030)], torch.float16)
    check(B, A, *scalars(B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_another_type_of_the_pair(dtype, garbage):
    B, A = draw([8, 8], [(48, 40)], torch.bfloat16)
    check(B, A, *scalars(B), dtype=dtype)


@built
@pytest.mark.parametrize("kind", [scalars, lambda B: blocks(B, 8)])
def test_the_same_bits_for_any_number_of_threads_and_for_described_factors(kind, garbage):
    B, A = draw([8] * 4, [(3000, 5000), (40, 30)], torch.bfloat16)
    P, Q = kind(B)
    once = described(B, A)
    found = []
    for count in (1, 2):
        with threads(count):
            found += [combine_products(B, A, P, Q), combine_products(once.B, once.A, P, Q)]
    kept = prepare(B, A)
    found.append(combine_products(kept.B, kept.A, P, Q))
    first = [t for side in found[0] for part in side for t in part]
    for other in found[1:]:
        for a, b in zip(first, [t for side in other for part in side for t in part], strict=True):
            assert torch.equal(a, b)


@built
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level, monkeypatch, garbage):
    if level > native_calls.level():
        pytest.skip("not on this processor")
    monkeypatch.setattr(native_calls, "level", lambda: level)
    B, A = draw([8, 8, 8], [(600, 77)], torch.bfloat16)
    check(B, A, *scalars(B), backend="native")
    check(B, A, *blocks(B, 9), backend="native")


def test_bad_arguments_are_named():
    B, A = draw([8, 8], [(48, 40)], torch.float32)
    P, Q = blocks(B, 8)
    with pytest.raises(ValueError, match=r"P\[0\]: expected float64 \(2,\) or \(16, r\)"):
        combine_products(B, A, [P[0][:5]], Q)
    with pytest.raises(ValueError, match="Q: 0 modules, A has 1"):
        combine_products(B, A, P, [])
    with pytest.raises(ValueError, match=r"A\[0\]\[1\]: rank 4, B\[0\]\[1\] has rank 8"):
        combine_products(B, [[A[0][0], A[0][1][:4]]], P, Q)
