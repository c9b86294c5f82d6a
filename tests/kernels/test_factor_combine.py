import importlib
import importlib.util

import numpy as np
import pytest
import torch

from fedgram.kernels import factor_combine
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, SHAPES, TYPES, draw, garbage, padded, stack_A, stack_B

__all__ = ["garbage"]
# One rounding to the output type, after sums that are float64 in the torch twin and hold 2e-6 of |x| |c| on Triton.
SUM = {"native": 1e-14, "torch": 1e-14, "triton": 2e-6}
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float16: 2.0**-24}  # below this spacing float16 has no relative precision left


def blocks(ranks, modules, r, seed=5):
    g = torch.Generator().manual_seed(seed)
    R = sum(ranks)
    P = [torch.randn(R, r, generator=g, dtype=torch.float64) for _ in modules]
    return P, [torch.randn(r, R, generator=g, dtype=torch.float64) for _ in modules]


def scalars(ranks, modules, seed=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(len(ranks), generator=g, dtype=torch.float64) for _ in modules]


def expected(clients, c, dim):
    """The combination and the sum of its terms' magnitudes, float64."""
    if c.ndim == 1:
        rank = max(t.shape[dim] for t in clients)
        terms = [w * padded(t, rank, dim) for w, t in zip(c, clients, strict=True)]
        return sum(terms), sum(t.abs() for t in terms)
    if dim == 1:
        return stack_B(clients) @ c, stack_B(clients).abs() @ c.abs()
    return c @ stack_A(clients), c.abs() @ stack_A(clients).abs()


def check(factors, coefficients, outputs, dim, dtype, backend):
    summing = SUM["torch" if torch.float64 in (dtype, factors[0][0].dtype) else backend]
    for clients, c, got in zip(factors, coefficients, outputs, strict=True):
        exact, size = expected(clients, c, dim)
        assert got.shape == exact.shape
        assert got.dtype == dtype
        assert got.is_contiguous()
        allowed = EPS[dtype] / 2 * exact.abs() + 2 * summing * size + SMALLEST.get(dtype, 1e-40)
        assert bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_blocks_and_scalars(backend, dtype, case, garbage):
    ranks, modules = SHAPES[case]
    B, A = draw(ranks, modules, dtype)
    for P, Q in (blocks(ranks, modules, 5), (scalars(ranks, modules),) * 2):
        left, right = factor_combine(B, A, P, Q, backend=backend)
        check(B, P, left, 1, dtype, backend)
        check(A, Q, right, 0, dtype, backend)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_scalars_of_equal_ranks_are_sums_of_whole_tensors(garbage):
    """One rule for a call: tensors of one shape, side by side, are added up as they lie; others as columns."""
    module = importlib.import_module("fedgram.kernels.factor_combine")
    B, A = draw((4, 4), ((30, 12), (0, 7), (8, 5)), torch.float32)
    p = scalars((4, 4), B)
    pointers = np.array([t.data_ptr() for side in (B, A) for clients in side for t in clients], np.int64)
    asked = [module.Combination(B, A, P, p, None) for P in (p, blocks((4, 4), B, 3)[0])]
    kinds = [type(module._plan(a, pointers)).__name__ for a in asked]
    assert kinds == ["ScalarPlan", "CombinePlan"]
    turned = [[t.T.contiguous().T for t in clients] for clients in B]
    assert type(module._plan(module.Combination(turned, A, p, p, None), pointers)).__name__ == "CombinePlan"
    for left in (B, turned):
        out_B, out_A = factor_combine(left, A, p, p, backend="triton")
        check(left, p, out_B, 1, torch.float32, "triton")
        check(A, p, out_A, 0, torch.float32, "triton")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("r", [0, 1, 16, 33, 70])
def test_output_ranks(backend, r, garbage):
    ranks, modules = [3, 8], [(70, 40), (131, 8)]
    for dtype in (torch.bfloat16, torch.float32):
        B, A = draw(ranks, modules, dtype)
        P, Q = blocks(ranks, modules, r)
        left, right = factor_combine(B, A, P, Q, backend=backend)
        check(B, P, left, 1, dtype, backend)
        check(A, Q, right, 0, dtype, backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_strides(backend, layout, dtype, garbage):
    ranks, modules = [8, 3], [(70, 40), (33, 65)]
    B, A = draw(ranks, modules, dtype, layout=layout)
    P, Q = blocks(ranks, modules, 4)
    P = [p.T.contiguous().T for p in P]
    left, right = factor_combine(B, A, P, scalars(ranks, modules), backend=backend)
    check(B, P, left, 1, dtype, backend)
    check(A, scalars(ranks, modules), right, 0, dtype, backend)
    _, right = factor_combine(None, A, None, Q, backend=backend)
    check(A, Q, right, 0, dtype, backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("out", TYPES)
def test_the_output_type_is_asked_for(backend, dtype, out, garbage):
    ranks, modules = [4, 8], [(60, 40)]
    B, A = draw(ranks, modules, dtype)
    P, Q = blocks(ranks, modules, 8)
    left, right = factor_combine(B, A, P, Q, dtype=out, backend=backend)
    check(B, P, left, 1, out, backend)
    check(A, Q, right, 0, out, backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_one_client_of_weight_one_comes_back_bit_for_bit(backend):
    for dtype in TYPES:
        B, A = draw([5], [(50, 70)], dtype)
        one = [torch.ones(1, dtype=torch.float64)]
        (b,), (a,) = factor_combine(B, A, one, one, backend=backend)
        assert torch.equal(b, B[0][0])
        assert torch.equal(a, A[0][0])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_side_is_skipped(backend):
    B, A = draw([2, 3], [(20, 30)], torch.float32)
    P, Q = blocks([2, 3], [0], 4)
    left, right = factor_combine(B, A, P, Q, backend=backend)
    only_left, nothing = factor_combine(B, None, P, None, backend=backend)
    assert nothing is None
    assert torch.equal(only_left[0], left[0])
    nothing, only_right = factor_combine(None, A, None, Q, backend=backend)
    assert nothing is None
    assert torch.equal(only_right[0], right[0])
    assert factor_combine([], [], [], [], backend=backend) == ([], [])


def test_coefficients_of_another_call_are_not_kept(garbage):
    """The plan is one, the addresses of the coefficients are every call's own."""
    B, A = draw([2, 3], [(20, 30)], torch.float32)
    for seed in range(3):
        P, Q = blocks([2, 3], [0], 4, seed)
        left, _ = factor_combine(B, A, P, Q, backend="triton")
        check(B, P, left, 1, torch.float32, "triton")


def test_several_blocks_of_rows_on_the_cpu(monkeypatch, garbage):
    """The torch twin in blocks of 128 rows, ragged and even, gives what one block gives."""
    ranks, modules = [3, 8], [(300, 260)]
    monkeypatch.setattr("fedgram.kernels._factor_inputs.CACHE_BYTES", 1)
    monkeypatch.setattr("fedgram.kernels._factor_combine_torch.CACHE_BYTES", 1)
    for ranks in ([3, 8], [4, 4]):
        B, A = draw(ranks, modules, torch.bfloat16)
        for P, Q in (blocks(ranks, modules, 5), (scalars(ranks, modules),) * 2):
            left, right = factor_combine(B, A, P, Q, backend="torch")
            check(B, P, left, 1, torch.bfloat16, "torch")
            check(A, Q, right, 0, torch.bfloat16, "torch")


def test_clients_of_several_types():
    B, A = draw([2, 2], [(5, 6)], torch.float32)
    B[0][1] = B[0][1].bfloat16()
    P, Q = blocks([2, 2], [0], 2)
    left, _ = factor_combine(B, A, P, Q)
    check(B, P, left, 1, torch.float32, "torch")
    with pytest.raises(ValueError, match="backend='triton': module 0: the clients' factors have several types"):
        factor_combine(B, A, P, Q, backend="triton")


z = torch.zeros
B1, A1, P1, Q1 = [[z(3, 2)]], [[z(2, 4)]], [z(2, 2).double()], [z(2, 2).double()]
BAD = {
    "B and A are both None": (None, None, None, None),
    "P: must be None exactly where B is None": (B1, A1, None, Q1),
    "Q: must be None exactly where A is None": (B1, None, P1, Q1),
    "P: 2 modules, B has 1": (B1, A1, P1 * 2, Q1),
    r"P\[0\]: expected float64 \(1,\) or \(2, r\), got \(3, 2\)": (B1, A1, [z(3, 2).double()], Q1),
    r"Q\[0\]: expected float64 \(1,\) or \(r, 2\), got \(2, 3\)": (B1, A1, P1, [z(2, 3).double()]),
    r"Q\[0\]: expected float64 \(1,\) or \(r, 2\), got \(2, 2\) torch.float32": (B1, A1, P1, [z(2, 2)]),
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_named(backend, reason):
    with pytest.raises(ValueError, match=reason):
        factor_combine(*BAD[reason], backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_output_type_must_be_a_float_type(backend):
    with pytest.raises(ValueError, match=r"dtype: expected a float type, got torch\.int32"):
        factor_combine(B1, A1, P1, Q1, dtype=torch.int32, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("ranks", [[4], [4, 8], [4, 4]])
def test_coefficients_that_are_views_which_negate_their_memory(backend, ranks):
    """Loops and kernels read memory: theirs has the other sign, and the gaps of a complex tensor."""
    modules = [(33, 20)]
    B, A = draw(ranks, modules, torch.float32)
    for P, Q in (blocks(ranks, modules, 4), (scalars(ranks, modules), scalars(ranks, modules, 7))):
        views = [[torch.complex(torch.zeros_like(c), -c).conj().imag for c in side] for side in (P, Q)]
        assert views[0][0].is_neg()
        for found, plain in zip(
            factor_combine(B, A, *views, backend=backend), factor_combine(B, A, P, Q, backend=backend), strict=True
        ):
            assert torch.equal(found[0], plain[0])
