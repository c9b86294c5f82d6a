import pytest
import torch

from fedgram.kernels import factor_cross
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, SHAPES, TYPES, draw, garbage, lay, stack_A, stack_B

__all__ = ["garbage"]
EPS64 = 2.0**-52
PROMISE = 2e-6  # relative to the norms of the two columns, as for factor_gram


def others(modules, k, dtype, layout="contiguous", seed=9):
    g = torch.Generator().manual_seed(seed)
    X_B = [lay(layout, torch.randn(m, k, generator=g).to(dtype)) for m, _ in modules]
    return X_B, [lay(layout, torch.randn(k, n, generator=g).to(dtype)) for _, n in modules]


def check(B, A, X_B, X_A, tolerance, **options):
    left, right = factor_cross(B, A, X_B, X_A, **options)
    pairs = [(p, stack_B(c), x.double()) for p, c, x in zip(left, B, X_B, strict=True)]
    pairs += [(p, stack_A(c).T, x.double().T) for p, c, x in zip(right, A, X_A, strict=True)]
    for product, columns, x in pairs:
        assert product.dtype == torch.float64
        assert product.shape == (columns.shape[1], x.shape[1])
        scale = (columns.norm(dim=0)[:, None] * x.norm(dim=0)[None, :]).clamp_min(1e-300)
        errors = (product - columns.T @ x).abs() / scale
        assert not errors.numel() or float(errors.max()) <= tolerance


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_products_are_those_of_the_stored_values(backend, dtype, case, garbage):
    ranks, modules = SHAPES[case]
    tolerance = PROMISE if backend == "triton" and dtype != torch.float64 else 300 * EPS64
    for k in (0, 1, 8, 70):
        check(*draw(ranks, modules, dtype), *others(modules, k, dtype), tolerance, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_any_strides_of_either_operand(backend, layout, x_layout, garbage):
    modules = [(48, 40), (33, 65)]
    x = others(modules, 8, torch.bfloat16, x_layout)
    check(*draw([8, 16], modules, torch.bfloat16, layout=layout), *x, PROMISE, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("x_dtype", TYPES)
def test_types_of_the_operands_may_differ(backend, dtype, x_dtype, garbage):
    """Nothing is rounded to the narrower type: the error stays at float32 sums, or float64 where one is float64."""
    modules = [(60, 40)]
    tolerance = 100 * EPS64 if torch.float64 in (dtype, x_dtype) else PROMISE
    check(*draw([4, 8], modules, dtype), *others(modules, 8, x_dtype), tolerance, backend=backend)


def test_precise_multiplies_in_float64(garbage):
    modules = [(90, 40)]
    x = others(modules, 3, torch.float32)
    check(*draw([4, 8], modules, torch.float32), *x, 100 * EPS64, precise=True, backend="triton")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_side_is_skipped(backend):
    modules = [(20, 30)]
    B, A = draw([2, 3], modules, torch.float32)
    X_B, X_A = others(modules, 4, torch.float32)
    left, right = factor_cross(B, A, X_B, X_A, backend=backend)
    only_left, nothing = factor_cross(B, None, X_B, None, backend=backend)
    assert nothing is None
    assert torch.equal(only_left[0], left[0])
    nothing, only_right = factor_cross(None, A, None, X_A, backend=backend)
    assert nothing is None
    assert torch.equal(only_right[0], right[0])
    assert factor_cross([], [], [], [], backend=backend) == ([], [])


def test_the_same_bits_every_time(garbage):
    modules = [(600, 70)]
    B, A = draw([5, 16], modules, torch.bfloat16)
    x = others(modules, 8, torch.bfloat16)
    first, second = (factor_cross(B, A, *x, backend="triton") for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


t = torch.zeros
BAD = {
    "B and A are both None": (None, None, None, None),
    "X_B: must be None exactly where B is None": ([[t(3, 2)]], [[t(2, 4)]], None, [t(1, 4)]),
    "X_A: 2 modules, A has 1": (None, [[t(2, 4)]], None, [t(1, 4)] * 2),
    r"X_B\[0\]: expected a float matrix with dimension 0 of 3": ([[t(3, 2)]], None, [t(4, 1)], None),
    r"X_A\[0\]: expected a float matrix with dimension 1 of 4": (None, [[t(2, 4)]], None, [t(1, 5)]),
    r"X_A\[0\]: expected .* got \(1, 4\) torch.int64": (None, [[t(2, 4)]], None, [t(1, 4).long()]),
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_named(backend, reason):
    with pytest.raises(ValueError, match=reason):
        factor_cross(*BAD[reason], backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_matrices_that_are_views_which_negate_their_memory(backend):
    modules = [(33, 20)]
    B, A = draw([4, 8], modules, torch.float32)
    X = others(modules, 8, torch.float32)
    views = [[torch.complex(torch.zeros_like(x), -x).conj().imag for x in side] for side in X]
    assert views[0][0].is_neg()
    for found, plain in zip(
        factor_cross(B, A, *views, backend=backend), factor_cross(B, A, *X, backend=backend), strict=True
    ):
        assert torch.equal(found[0], plain[0])
