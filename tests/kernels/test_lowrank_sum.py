import importlib
from types import SimpleNamespace

import pytest
import torch

from fedgram.kernels import _memory, lowrank_sum, native_calls
from fedgram_testing.factor_ops import ALL_BACKENDS, LAYOUTS, TYPES, garbage
from fedgram_testing.sums import case, check, sum_type

__all__ = ["garbage"]
module = importlib.import_module("fedgram.kernels.lowrank_sum")
SHAPES = {
    "odd ranks": ([1, 3, 5], 65, 33),
    "ragged ranks": ([4, 8, 16, 65], 100, 104),
    "one client": ([4], 300, 16),
    "many clients": ([8] * 10, 130, 136),
    "one row": ([2, 2], 1, 200),
    "one column": ([2, 2], 90, 1),
    "a client of rank 0": ([0, 2], 9, 9),
    "nothing but rank 0": ([0], 5, 6),
    "no rows": ([3], 0, 5),
    "no columns": ([3], 5, 0),
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_round_once(backend, dtype, shape, garbage):
    W, B, A, c = case(*SHAPES[shape], dtype)
    for beta in (1.0, 0.3):
        got = lowrank_sum(W, B, A, c, beta=beta, backend=backend)
        assert got.dtype == dtype
        assert got is not W
        check(got, W, B, A, c, beta, sum_type=sum_type(backend, dtype, dtype))
    check(lowrank_sum(None, B, A, c, backend=backend), None, B, A, c, 1.0, sum_type=sum_type(backend, dtype, dtype))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("w_dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_and_strides_may_differ(backend, dtype, w_dtype, layout, garbage):
    W, B, A, c = case([8, 3], 70, 48, dtype, w_dtype, layout)
    got = lowrank_sum(W, B, A, c, backend=backend)
    assert got.dtype == w_dtype
    check(got, W, B, A, c, 1.0, sum_type=sum_type(backend, dtype, w_dtype))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_is_out_of_place(backend, layout, garbage):
    W, B, A, c = case([8, 3], 70, 48, torch.float32, layout=layout)
    expected = lowrank_sum(W, B, A, c, beta=0.5, backend=backend)
    assert lowrank_sum(W, B, A, c, beta=0.5, out=W, backend=backend) is W
    assert torch.equal(W, expected)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out_of_another_type_and_its_neighbours(backend, garbage):
    """What surrounds a strided output stays as it was."""
    W, B, A, c = case([8, 3], 70, 48, torch.float32)
    memory = torch.full((72, 60), 7.0, dtype=torch.bfloat16)
    out = memory[1:71, 5:53]
    assert lowrank_sum(W, B, A, c, out=out, backend=backend) is out
    check(out, W, B, A, c, 1.0, sum_type=torch.float32)
    memory[1:71, 5:53] = 7
    assert bool((memory == 7).all())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out_may_be_a_neighbour_of_the_factors_in_memory(backend, garbage):
    """Parameters of one flat buffer: nothing overlaps, and nothing but ``out`` changes."""
    memory = torch.randn(64)
    before = memory.clone()
    b, a, out = memory[:6].view(3, 2), memory[6:14].view(2, 4), memory[14:26].view(3, 4)
    c = torch.ones(1, dtype=torch.float64)
    version = out._version
    lowrank_sum(out, [b], [a], c, out=out, backend=backend)
    assert out._version > version
    check(out, before[14:26].view(3, 4), [b], [a], c, 1.0, sum_type=torch.float32)
    assert torch.equal(memory[:14], before[:14])
    assert torch.equal(memory[26:], before[26:])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_w_is_not_read_for_beta_zero(backend):
    _, B, A, c = case([8, 3], 20, 30, torch.float32)
    W = torch.full((20, 30), float("nan"))
    got = lowrank_sum(W, B, A, c, beta=0.0, backend=backend)
    assert torch.equal(got, lowrank_sum(None, B, A, c, backend=backend))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_beta_keeps_its_float64_digits(backend):
    W, B, A, c = case([1], 4, 5, torch.float64)
    got = lowrank_sum(W, B, A, 0 * c, beta=1 / 3, backend=backend)
    assert bool(((got - W / 3).abs() <= 2.0**-52 * W.abs()).all())  # float32 digits of 1/3 would miss by 2^-26


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_the_same_bits_every_time(backend, garbage):
    W, B, A, c = case([5, 16, 33], 130, 150, torch.bfloat16)
    first, *others = (lowrank_sum(W, B, A, c, backend=backend) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_many_ranks_are_packed_in_chunks(monkeypatch, garbage):
    """The torch twin with chunks that cut through clients and tiles that cut through W."""
    monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(module, "TILE", (32, 48))
    W, B, A, c = case([4, 3, 16, 0, 7], 70, 100, torch.float32)
    check(lowrank_sum(W, B, A, c, backend="torch"), W, B, A, c, 1.0, sum_type=torch.float64)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_loops_cut_ranks_and_tiles(dtype, garbage):
    """Runs of 64 ranks cut through clients, tiles of 96 x 256 through W; float64 beyond a run."""
    if native_calls.missing() is not None:
        pytest.skip(native_calls.missing())
    W, B, A, c = case([60, 3, 66, 0, 7, 130], 200, 530, dtype)
    got = lowrank_sum(W, B, A, c, beta=0.5, backend="native")
    check(got, W, B, A, c, 0.5, sum_type=sum_type("native", dtype, dtype))


def test_split_bfloat16_products_hold_float32(monkeypatch, garbage):
    """The GPU's way for many ranks, with its one GPU-only call done on the CPU: two native terms lose 2^-16."""

    def add_native(total, b, a):
        assert b.dtype == a.dtype == torch.bfloat16
        total += b.float() @ a.float()

    monkeypatch.setattr(module, "_add_native", add_native)
    _, B, A, c = case([16] * 4, 40, 50, torch.bfloat16)
    b = torch.cat([w * t.double() for w, t in zip(c, B, strict=True)], 1)
    total = torch.zeros(40, 50)
    module._add_product(total, b.float(), torch.cat(A, 0))
    exact, size = b @ torch.cat(A, 0).double(), b.abs() @ torch.cat(A, 0).double().abs()
    assert bool(((total - exact).abs() <= 2.0**-16 * size).all())


def test_cublas_takes_much_arithmetic_in_its_fast_types():
    """The rule of ``auto`` on a GPU, as it is documented."""
    for dtype, ranks, expected in (
        (torch.bfloat16, [16] * 16, True),
        (torch.float64, [256], True),
        (torch.bfloat16, [16] * 15, False),
        (torch.float32, [16] * 100, False),
        (torch.float16, [16] * 100, False),
    ):
        assert module.cublas_wins([torch.empty(2, r, dtype=dtype) for r in ranks]) is expected


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_clients_of_several_types(backend):
    W, B, A, c = case([2, 2], 6, 7, torch.float32)
    A[1] = A[1].bfloat16()
    if backend == "triton":
        with pytest.raises(ValueError, match=r"^backend='triton': the clients' factors have several types"):
            lowrank_sum(W, B, A, c, backend=backend)
    else:
        sums = sum_type(backend, torch.float32, torch.float32)
        check(lowrank_sum(W, B, A, c, backend=backend), W, B, A, c, 1.0, sum_type=sums)


z, one = torch.zeros, torch.ones(1, dtype=torch.float64)
shared = torch.zeros(40)
BAD = {
    "B: expected a sequence of at least one": (None, [], [], one, None),
    r"coefficients: expected float64 \(1,\), got \(2,\)": (None, [z(3, 2)], [z(2, 4)], z(2).double(), None),
    r"coefficients: expected float64 \(1,\), got \(1,\) torch.float32": (None, [z(3, 2)], [z(2, 4)], z(1), None),
    r"W: expected a float matrix \(3, 4\), got \(4, 3\)": (z(4, 3), [z(3, 2)], [z(2, 4)], one, None),
    r"out: expected a float matrix \(3, 4\), got \(3, 4\) torch.int32": (
        None,
        [z(3, 2)],
        [z(2, 4)],
        one,
        z(3, 4).int(),
    ),
    r"A\[0\]\[0\]: rank 3, B\[0\]\[0\] has rank 2": (None, [z(3, 2)], [z(3, 4)], one, None),
    r"out: shares memory with B\[0\]": (None, [shared[:6].view(3, 2)], [z(2, 4)], one, shared[5:17].view(3, 4)),
    "out: shares memory with W without being W": (
        shared[:12].view(3, 4),
        [z(3, 2)],
        [z(2, 4)],
        one,
        shared[1:13].view(3, 4),
    ),
    r"out: shares memory with A\[0\]": (None, [z(3, 2)], [shared[6:14].view(2, 4)], one, shared[13:25].view(3, 4)),
    r"A\[0\]\[0\]: a view that negates its memory": (
        None,
        [z(7, 2)],
        [z(2, 9, dtype=torch.cfloat).conj().imag],
        one,
        None,
    ),
    "W: a view that negates its memory": (z(3, 4, dtype=torch.cfloat).conj().imag, [z(3, 2)], [z(2, 4)], one, None),
    "out: its elements share memory": (None, [z(3, 2)], [z(2, 4)], one, z(1, 4).expand(3, 4)),
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("reason", BAD)
def test_bad_input_is_named(backend, reason):
    W, B, A, c, out = BAD[reason]
    with pytest.raises(ValueError, match=reason):
        lowrank_sum(W, B, A, c, out=out, backend=backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_coefficient_that_is_a_view_which_negates_its_memory(backend):
    """Of one client it counts as contiguous: nothing else would copy it."""
    W, B, A, c = case([4], 33, 20, torch.float32)
    view = torch.complex(torch.zeros_like(c), -c).conj().imag
    assert view.is_neg()
    assert torch.equal(lowrank_sum(W, B, A, view, backend=backend), lowrank_sum(W, B, A, c, backend=backend))


def test_large_results_ask_for_large_pages_within_themselves(monkeypatch):
    asked = []
    libc = SimpleNamespace(madvise=lambda *args: asked.append([getattr(a, "value", a) for a in args]))
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(_memory, "_LARGE_PAGES", 14)
    for nbytes, page in ((1 << 25, 1 << 21), ((1 << 25) - 1, 1 << 21), ((1 << 25) + 3 * 4096 + 5, 4096)):
        asked.clear()
        monkeypatch.setattr(_memory, "LARGE_PAGE", page)
        t = torch.empty(nbytes, dtype=torch.uint8)
        _memory.ask_for_large_pages(torch.empty(3))
        _memory.ask_for_large_pages(t)
        if nbytes < _memory.LARGE:
            assert not asked
            continue
        [(first, length, advice)] = asked
        assert first % page == length % page == 0
        assert t.data_ptr() <= first < t.data_ptr() + page
        assert t.data_ptr() + nbytes - page < first + length <= t.data_ptr() + nbytes
        assert advice == 14


def test_a_new_result_on_large_pages_is_the_one_that_is_written_into_another():
    B, A = [torch.randn(4096, 3)], [torch.randn(3, 2048)]
    W, c = torch.randn(4096, 2048), torch.tensor([0.5], dtype=torch.float64)
    assert torch.equal(lowrank_sum(W, B, A, c), lowrank_sum(W, B, A, c, out=torch.empty_like(W)))
