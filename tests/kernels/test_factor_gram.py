import importlib

import pytest
import torch

from fedgram.kernels import _factor_gram_plan, factor_gram
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, SHAPES, TYPES, draw, garbage, stack_A, stack_B

__all__ = ["garbage"]
EPS64 = 2.0**-52
# Promises, relative to |x_i| |x_j|: float32 chains of at most 256 products lose less than 256 * 2^-24 = 1.5e-5 if every
# rounding went one way, and sqrt of that with signs: 2e-6 is promised. float64 loses at most (rows) * eps.
PROMISE = 2e-6


def error(gram, columns):
    """Largest error relative to the norms of the two columns."""
    exact, norms = columns.T @ columns, columns.norm(dim=0)
    return largest((gram - exact).abs() / (norms[:, None] * norms[None, :]).clamp_min(1e-300))


def largest(t):
    return float(t.max()) if t.numel() else 0.0


def check(B, A, tolerance, **options):
    G_B, G_A = factor_gram(B, A, **options)
    assert len(G_B) == len(B)
    assert len(G_A) == len(A)
    for gram, columns in [
        *((g, stack_B(bs)) for g, bs in zip(G_B, B, strict=True)),
        *((g, stack_A(as_).T) for g, as_ in zip(G_A, A, strict=True)),
    ]:
        assert gram.dtype == torch.float64
        assert gram.shape == (columns.shape[1],) * 2
        assert torch.equal(gram, gram.T)
        assert error(gram, columns) <= tolerance
    return G_B + G_A


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_grams_are_those_of_the_stored_values(backend, dtype, case, garbage):
    B, A = draw(*SHAPES[case], dtype)
    check(B, A, PROMISE if backend == "triton" and dtype != torch.float64 else 300 * EPS64, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_strides(backend, layout, dtype, garbage):
    B, A = draw([8, 3], [(70, 40), (33, 65)], dtype, layout=layout)
    check(B, A, PROMISE, backend=backend)


def test_modules_of_different_types_and_layouts_in_one_call(garbage):
    B, A = [], []
    for i, (layout, dtype) in enumerate(zip(LAYOUTS, [*TYPES, torch.bfloat16], strict=True)):
        b, a = draw([4, 8], [(50, 40)], dtype, layout=layout, seed=i)
        B, A = B + b, A + a
    check(B, A, PROMISE, backend="triton")


@pytest.mark.parametrize("dtype", TYPES)
def test_precise_multiplies_in_float64(dtype, garbage):
    B, A = draw([3, 8], [(200, 70)], dtype)
    check(B, A, 200 * EPS64, precise=True, backend="triton")


def test_one_expanded_client(garbage):
    B = [[torch.randn(40, 1).expand(40, 6), torch.randn(1, 5).expand(40, 5)]]
    A = [[torch.randn(6, 30), torch.randn(1, 30).expand(5, 30)]]
    check(B, A, PROMISE, backend="triton")


@pytest.mark.parametrize("constant", [False, True])
def test_long_sums_stay_within_the_promise(constant, garbage):
    """All products of one sign: a single float32 chain would end some 1e-5 low."""
    B = [[(torch.full((20_000, 2), 0.7) if constant else torch.rand(20_000, 2)).bfloat16()]]
    A = [[torch.rand(2, 9_000).bfloat16()]]
    check(B, A, PROMISE, backend="triton")


def test_batches_do_not_change_the_bits(monkeypatch, garbage):
    B, A = draw([16] * 9, [(70, 72), (600, 90)], torch.float32)
    whole = check(B, A, PROMISE, backend="triton")
    importlib.import_module("fedgram.kernels.factor_gram").PLANS.plans.clear()
    monkeypatch.setattr(_factor_gram_plan, "PARTIAL_BYTES", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, check(B, A, PROMISE, backend="triton"), strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_same_bits_every_time(backend, garbage):
    B, A = draw([5, 16, 64], [(700, 300)], torch.bfloat16)
    first, *others = ([g for side in factor_gram(B, A, backend=backend) for g in side] for _ in range(3))
    assert all(torch.equal(a, b) for again in others for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_client_that_is_not_a_number_spoils_only_its_own_products(backend):
    B, A = draw([3, 4], [(20, 30)], torch.float32)
    B[0][1][3, 2] = float("nan")
    G_B, G_A = factor_gram(B, A, backend=backend)
    spoilt = torch.zeros(7, 7, dtype=torch.bool)
    spoilt[5], spoilt[:, 5] = True, True
    assert torch.equal(G_B[0].isnan(), spoilt)
    assert not G_A[0].isnan().any()


def test_plans_follow_the_layout_and_addresses_the_call(garbage):
    """Equal layouts elsewhere in memory, new values in place, and another alignment: never a stale address or hint."""
    plans = importlib.import_module("fedgram.kernels.factor_gram").PLANS
    plans.plans.clear()
    for seed in range(3):
        B, A = draw([8, 8], [(40, 48)], torch.bfloat16, seed=seed)
        check(B, A, PROMISE, backend="triton")
    B[0][0].mul_(2)
    check(B, A, PROMISE, backend="triton")
    assert len(plans.plans) == 1
    B, A = draw([8, 8], [(40, 48)], torch.bfloat16, layout="misaligned")
    check(B, A, PROMISE, backend="triton")
    assert len(plans.plans) == 2


def test_no_modules():
    assert factor_gram([], []) == ([], [])
    assert factor_gram([], [], backend="triton") == ([], [])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_results_need_no_gradient(backend):
    B, A = draw([2], [(5, 6)], torch.float32)
    G_B, _ = factor_gram([[B[0][0].requires_grad_()]], A, backend=backend)
    assert not G_B[0].requires_grad


def test_clients_of_several_types():
    """The torch twin takes them; the kernels read one type, and say so when they are ordered to."""
    B, A = draw([2, 2], [(5, 6)], torch.float32)
    B[0][1] = B[0][1].bfloat16()
    check(B, A, 10 * EPS64)
    with pytest.raises(ValueError, match=r"backend='triton': module 0: the clients' factors have several types"):
        factor_gram(B, A, backend="triton")


t = torch.zeros
BAD = {
    r"A: 0 modules, B has 1": ([[t(3, 2)]], []),
    r"B\[0\]: expected a sequence of at least one": ([[]], [[]]),
    r"A\[0\]: 2 clients, B\[0\] has 1": ([[t(3, 2)]], [[t(2, 4), t(2, 4)]]),
    r"A\[0\]\[1\]: rank 3, B\[0\]\[1\] has rank 2": ([[t(3, 2)] * 2], [[t(2, 4), t(3, 4)]]),
    r"B\[0\]\[1\]: dimension 0 is 4, client 0 has 3": ([[t(3, 2), t(4, 2)]], [[t(2, 4), t(2, 4)]]),
    r"B\[0\]\[0\]: expected a float matrix, got \(3,\)": ([[t(3)]], [[t(2, 4)]]),
    r"A\[0\]\[0\]: expected a float matrix, got \(2, 4\) torch.int64": ([[t(3, 2)]], [[t(2, 4).long()]]),
    r"B\[0\]\[1\]: a view that negates its memory": (
        [[t(7, 2), t(7, 2, dtype=torch.cfloat).conj().imag]],
        [[t(2, 9)] * 2],
    ),
    r"tensors lie on several devices: cpu, meta": ([[t(3, 2)]], [[t(2, 4, device="meta")]]),
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_named(backend, reason):
    with pytest.raises(ValueError, match=reason):
        factor_gram(*BAD[reason], backend=backend)


def test_orders_that_cannot_be_followed(monkeypatch):
    B, A = draw([2], [(5, 6)], torch.float32)
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, native, torch, got 'cuda'"):
        factor_gram(B, A, backend="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"backend='triton': tensors are on cpu"):
        factor_gram(B, A, backend="triton")
