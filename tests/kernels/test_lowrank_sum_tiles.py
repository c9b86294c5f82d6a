"""``lowrank_sum`` on a matrix unit (AMX), on processors that have one."""

import pytest
import torch

from fedgram.kernels import _native_sums, lowrank_sum, native_calls
from fedgram_testing.factor_ops import LAYOUTS, garbage
from fedgram_testing.sums import case, check

__all__ = ["garbage"]
HERE = native_calls.missing() is None and native_calls.has_tiles()
pytestmark = pytest.mark.skipif(not HERE, reason="this processor has no matrix unit, or the loops are not built")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "whole tiles": ([32], 64, 256),
    "odd ranks": ([1, 3, 5], 65, 33),
    "ragged ranks, more than stay in the first cache": ([60, 3, 66, 0, 7, 130], 200, 530),
    "two runs of sums in float": ([300, 500], 40, 300),
    "three runs": ([8] * 150, 33, 270),
    "many clients": ([8] * 10, 130, 136),
    "one row": ([2, 20], 1, 200),
    "one column": ([17, 2], 90, 1),
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However small a sum, the unit takes it."""
    monkeypatch.setattr(_native_sums, "TILED_RANK", {2: 1, 4: 1})
    monkeypatch.setattr(_native_sums, "TILED_WORK", 0)


@pytest.fixture
def no_vectors(monkeypatch):
    monkeypatch.delattr(_native_sums, "_in_vectors")


def in_vectors(*arguments, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native_sums, "has_tiles", lambda: False)
        return lowrank_sum(*arguments, backend="native", **options)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("w_dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_round_once(dtype, w_dtype, shape, garbage, no_vectors):
    W, B, A, c = case(*SHAPES[shape], dtype, w_dtype)
    for beta in (1.0, 0.3, 0.0):
        got = lowrank_sum(W, B, A, c, beta=beta, backend="native")
        check(got, W, B, A, c, beta, sum_type=torch.float32)
    check(lowrank_sum(None, B, A, c, backend="native"), None, B, A, c, 1.0, sum_type=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_outputs(layout, garbage, no_vectors):
    """What surrounds a strided output stays as it was; clients may be of several types."""
    W, B, A, c = case([16, 3], 70, 48, torch.float32, layout=layout)
    A[0] = A[0].bfloat16()
    memory = torch.full((72, 60), 7.0, dtype=torch.bfloat16)
    out = memory[1:71, 5:53]
    check(lowrank_sum(W, B, A, c, out=out, backend="native"), W, B, A, c, 1.0, sum_type=torch.float32)
    memory[1:71, 5:53] = 7
    assert bool((memory == 7).all())
    expected = lowrank_sum(W, B, A, c, beta=0.5, backend="native")
    assert torch.equal(lowrank_sum(W, B, A, c, beta=0.5, out=W, backend="native"), expected)


def test_float32_keeps_its_digits(no_vectors):
    """All three parts of a number count: two would lose 2^-16, one 2^-8."""
    _, B, A, c = case([1], 40, 300, torch.float32)
    got = lowrank_sum(None, B, A, c, backend="native")
    exact = c * (B[0].double() @ A[0].double())
    assert float(((got - exact) / exact).abs().max()) < 2.5 * 2.0**-24


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, 1e-33])
@pytest.mark.parametrize("side", ["B", "A"])
def test_what_the_unit_cannot_multiply_is_left_to_vectors(side, value, garbage):
    """It takes 1e-45 for zero, and infinity times a part that is zero would be NaN."""
    W, B, A, c = case([16, 3], 70, 300, torch.float32)
    c[0] = 1
    {"B": B, "A": A}[side][0][5, 7] = value
    got, expected = lowrank_sum(W, B, A, c, backend="native"), in_vectors(W, B, A, c)
    assert torch.equal(got.isnan(), expected.isnan())
    in_place = W.clone()  # whose rows are not to be read twice
    assert torch.equal(
        lowrank_sum(in_place, B, A, c, out=in_place, backend="native").nan_to_num(7.0), got.nan_to_num(7.0)
    )
    where = (slice(32), slice(None)) if side == "B" else (slice(None), slice(256))  # a panel, a group of panels
    got, expected = got.nan_to_num(7.0), expected.nan_to_num(7.0)
    assert torch.equal(got[where], expected[where])
    assert not torch.equal(got, expected)  # what is beside it stays with the unit


@pytest.mark.parametrize("scales", [(1e-20, 1e-15), (1e-36, 1e20), (1e-30, 1.0), (1e-10, 1e-10)])
def test_small_factors_keep_their_digits(scales):
    _, B, A, c = case([16, 3], 70, 300, torch.float32)
    B, A = [b * scales[0] for b in B], [a * scales[1] for a in A]
    check(lowrank_sum(None, B, A, c, backend="native"), None, B, A, c, 1.0, sum_type=torch.float32)


def test_factors_with_zeros_are_ordinary():
    """B begins at zero: that is no reason to leave it to vectors, which would show in the bits."""
    W, B, A, c = case([16, 16], 70, 300, torch.float32)
    B[0][:40], A[1][:, 256:] = 0, 0
    got, other = lowrank_sum(W, B, A, c, backend="native"), in_vectors(W, B, A, c)
    differing = got != other
    assert all(bool(part.any()) for part in (differing[:32, :256], differing[40:, :256], differing[40:, 256:]))


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_bands_show_in_the_bits(threads, monkeypatch, garbage):
    W, B, A, c = case([40, 100, 3], 700, 600, torch.float32)
    before = torch.get_num_threads()
    expected = lowrank_sum(W, B, A, c, backend="native")
    monkeypatch.setattr(_native_sums, "SIDE_BYTES", 1)  # a group of panels at a time
    torch.set_num_threads(threads)
    try:
        assert torch.equal(lowrank_sum(W, B, A, c, backend="native"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rank", "rows", "w_dtype", "unit"),
    [
        (8, 4096, torch.bfloat16, False),
        (16, 128, torch.bfloat16, False),
        (16, 4096, torch.bfloat16, True),
        (64, 4096, torch.float32, False),
        (96, 4096, torch.float32, True),
        (96, 4096, torch.float64, False),
    ],
)
def test_small_sums_stay_in_vectors(rank, rows, w_dtype, unit, monkeypatch):
    """Packing, and ranks padded to 32, would cost more than the unit saves; float64 it has not."""
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(_native_sums, "_on_matrix_unit", lambda *_: taken.append(True))
    monkeypatch.setattr(_native_sums, "_in_vectors", lambda *_, **__: taken.append(False))
    W, B, A, c = case([rank], rows, 512, torch.bfloat16, w_dtype)
    lowrank_sum(W, B, A, c, backend="native")
    assert taken == [unit]


def test_large_outputs_are_stored_past_the_caches(monkeypatch, garbage):
    """From 32 MiB on, as here from a byte on: the same bits, beside numbers that stay, and with parts of lines."""
    W, B, A, c = case([16, 3], 70, 600, torch.bfloat16)
    memory = torch.full((80, 704), 7.0, dtype=torch.bfloat16)
    places = [memory[3:73, 64:664], memory[3:73, 5:605]]  # from the start of a line on, and not
    for vectors in (False, True):
        if vectors:
            monkeypatch.setattr(_native_sums, "has_tiles", lambda: False)
        expected = lowrank_sum(W, B, A, c, backend="native")
        with monkeypatch.context() as patch:
            patch.setattr(_native_sums, "LARGE", 1)
            for out in places:
                assert torch.equal(lowrank_sum(W, B, A, c, out=out, backend="native"), expected)
                out.fill_(7)
                assert bool((memory == 7).all())


def test_a_w_of_float64_is_not_rounded_before_the_sum(no_vectors):
    """1 + 2^-24 alone rounds to 1 in float32; with 2^-30 more it does not."""
    W = torch.full((64, 300), 1 + 2.0**-24, dtype=torch.float64)
    B, A, out = torch.zeros(64, 32), torch.zeros(32, 300), torch.empty(64, 300)
    B[:, 5], A[5] = 2.0**-15, 2.0**-15
    lowrank_sum(W, [B], [A], torch.ones(1, dtype=torch.float64), out=out, backend="native")
    assert bool((out == 1 + 2.0**-23).all())
