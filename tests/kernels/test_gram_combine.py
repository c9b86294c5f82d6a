"""A combination and the Grams from one read: they are ``factor_combine``'s and ``factor_gram``'s."""

import pytest
import torch

from fedgram.kernels import described, factor_combine, factor_gram, gram_combine, native_calls, prepare
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, SHAPES, TYPES, draw, garbage
from fedgram_testing.gradients import threads

__all__ = ["garbage"]
built = pytest.mark.skipif(native_calls.missing() is not None, reason=str(native_calls.missing()))


def coefficients(B, rank=None, seed=3):
    """Blocks of a rank, or scalars."""
    g = torch.Generator().manual_seed(seed)
    P = []
    for bs in B:
        shape = (len(bs),) if rank is None else (sum(b.shape[1] for b in bs), rank)
        P.append(torch.randn(*shape, generator=g, dtype=torch.float64))
    return P, [p.flip(0) if rank is None else p.T.contiguous() for p in P]


def check(B, A, P, Q, **options):
    (left, right), (G_B, G_A) = gram_combine(B, A, P, Q, **options)
    want_B, want_A = factor_combine(B, A, P, Q, **options)
    options.pop("dtype", None)
    grams = factor_gram(B, A, **options)
    assert all(torch.equal(x, y) for x, y in zip([*G_B, *G_A], [*grams[0], *grams[1]], strict=True))
    for got, want in zip([*left, *right], [*want_B, *want_A], strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        # one order of the sum or another before the one rounding: a unit in the last place, seldom
        unit = torch.finfo(got.dtype).eps
        assert torch.allclose(got.double(), want.double(), rtol=2 * unit, atol=1e-13)
        assert got.dtype == torch.float64 or int((got != want).sum()) <= 0.01 * got.numel()
    check_beside(B, A, P, Q, **options)


def check_beside(B, A, P, Q, **options):
    """With the pair, as it was rounded, as one more client."""
    options |= {"dtype": None}
    (left, right), (G_B, G_A) = gram_combine(B, A, P, Q, beside=True, **options)
    options.pop("dtype")
    want_B, want_A = factor_gram(
        [(*bs, b) for bs, b in zip(B, left, strict=True)],
        [(*as_, a) for as_, a in zip(A, right, strict=True)],
        **options,
    )
    for got, want in zip([*G_B, *G_A], [*want_B, *want_A], strict=True):
        scale = want.diagonal().sqrt()
        assert got.shape == want.shape
        assert torch.equal(got, got.T)
        assert bool(((got - want).abs() <= 1e-13 * scale[:, None] * scale + 1e-300).all())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_it_is_the_grams_and_the_combination(backend, dtype, case, garbage):
    B, A = draw(*SHAPES[case], dtype)
    for rank in (
        (None, 20) if backend == "triton" else (None, 1, 8, 20)
    ):  # there it is two operations with tests of their own
        check(B, A, *coefficients(B, rank), backend=backend)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, garbage):
    B, A = draw([8, 8, 8], [(48, 40), (133, 65)], torch.bfloat16, layout=layout)
    check(B, A, *coefficients(B))
    check(B, A, *coefficients(B, 9))


@built
@pytest.mark.parametrize("ranks", [[16, 16, 16], [8] * 10, [4, 4], [24] * 3, [3, 5, 8]])
def test_scalars_of_members_that_fill_panels_or_do_not(ranks, garbage):
    B, A = draw(ranks, [(700, 515), (9, 1030)], torch.float16)
    check(B, A, *coefficients(B))


@built
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level, monkeypatch, garbage):
    if level > native_calls.level():
        pytest.skip("not on this processor")
    monkeypatch.setattr(native_calls, "level", lambda: level)
    B, A = draw([8, 8, 8], [(600, 77)], torch.bfloat16)
    check(B, A, *coefficients(B), backend="native")
    check(B, A, *coefficients(B, 9), backend="native")


@built
def test_the_same_bits_for_any_number_of_threads_and_for_described_factors(garbage):
    B, A = draw([8] * 4, [(3000, 5000), (40, 30)], torch.bfloat16)
    P, Q = coefficients(B)
    once, kept = described(B, A), prepare(B, A)
    found = []
    for count in (1, 2):
        with threads(count):
            found += [gram_combine(B, A, P, Q), gram_combine(once.B, once.A, P, Q), gram_combine(kept.B, kept.A, P, Q)]
    first = [t for side in found[0] for part in side for t in part]
    for other in found[1:]:
        assert all(map(torch.equal, first, [t for side in other for part in side for t in part]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_type_of_the_pair(dtype, garbage):
    B, A = draw([8, 8], [(48, 40)], torch.bfloat16)
    check(B, A, *coefficients(B), dtype=dtype)


def test_traced_in_one_graph():
    torch.compiler.reset()
    B, A = draw([3, 2], [(20, 30)], torch.float32)
    P, Q = coefficients(B)
    traced = torch.compile(gram_combine, fullgraph=True, backend="eager")(B, A, P, Q)
    for x, y in zip(traced, gram_combine(B, A, P, Q), strict=True):
        for got, want in zip(x, y, strict=True):
            torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_named():
    B, A = draw([8, 8], [(48, 40)], torch.float32)
    P, Q = coefficients(B, 8)
    with pytest.raises(ValueError, match=r"P\[0\]: expected float64 \(2,\) or \(16, r\)"):
        gram_combine(B, A, [P[0][:5]], Q)
    with pytest.raises(ValueError, match="Q: 0 modules, A has 1"):
        gram_combine(B, A, P, [])
